"""The card beside an adapter: what the hub reads, and that nothing a person wrote is lost."""

import sys

import pytest
from huggingface_hub import ModelCard

from adalora_scale.cli import main
from adalora_scale.export.model_card import CARD_NAME, card_text, command_line, remove_card, write_card
from adalora_scale.tasks.registry import TASKS
from tests.export.adapters import base_and_run


def a_card(**changes):
    values = {
        "title": "run", "base": "meta-llama/Llama-3.1-8B", "task": TASKS["causal_lm"], "merged": False,
        "datasets": ["openai/gsm8k", "rows/train.jsonl", "my.jsonl"], "table": {"ranks": "1 to 2"},
    }  # fmt: skip
    return card_text(**values | changes)


def test_the_hub_reads_the_card(tmp_path):
    """Else an adapter is listed without its base, its library or its data."""
    data = ModelCard(a_card(notes=["a | b"])).data
    assert (data.library_name, data.base_model, data.pipeline_tag) == (
        "peft",
        "meta-llama/Llama-3.1-8B",
        "text-generation",
    )
    assert data.datasets == ["openai/gsm8k", "rows/train.jsonl"] and "adalora" in data.tags
    local = ModelCard(a_card(base=str(tmp_path), merged=True, task=TASKS["sequence_classification"])).data
    assert (local.library_name, local.base_model) == ("transformers", None)  # the hub refuses a folder's path
    assert local.pipeline_tag == "text-classification"


def test_an_edited_card_stays(tmp_path):
    """An evening's prose would be gone with the next run."""
    path = tmp_path / CARD_NAME
    assert write_card(tmp_path, a_card()) and write_card(tmp_path, a_card(title="second"))
    assert "# second" in path.read_text()
    for edited in (path.read_text().replace("# second", "# mine"), path.read_text() + "more\n", "# my own\n", ""):
        path.write_text(edited)
        assert not write_card(tmp_path, a_card())
        remove_card(tmp_path)
        assert path.read_text() == edited
    path.write_text(a_card())
    remove_card(tmp_path)
    assert not path.exists()


def test_what_a_stranger_named_is_text_and_a_secret_is_left_out(monkeypatch):
    """A card is published: a name must not become markup, a token not readable."""
    card = a_card(title="x\n# y", table={"a": "<script>|`\x1b"})
    assert "\n# y" not in card and "<script>" not in card and "\x1b" not in card
    monkeypatch.setattr(
        sys, "argv", ["/opt/x/adalora-scale", "train", "training.hub_token=hf_abc", "data.max_length=4"]
    )
    assert command_line() == "adalora-scale train training.hub_token=… data.max_length=4"


@pytest.mark.parametrize("form", ["peft-lora", "merged"])
def test_an_export_has_a_card(form, tmp_path, request):
    """Else the folder that is uploaded says nothing of where it comes from."""
    base, run = base_and_run("gpt2", tmp_path, request)
    for _ in range(2):  # its own card does not keep an export from being replaced
        options = ["--format", form, "--base", str(base), "--overwrite"]
        assert main(["export", str(run), str(tmp_path / "out"), *options]) == 0
    card = ModelCard.load(tmp_path / "out" / CARD_NAME)
    assert card.data.library_name == ("transformers" if form == "merged" else "peft")
    assert "triplets over" in card.text
