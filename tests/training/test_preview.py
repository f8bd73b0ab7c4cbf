"""`adalora-scale preview` and a run's first example: what is shown is what is trained, and nothing else happens."""

import json
import re

import datasets
import pytest
import transformers
import yaml

from adalora_scale.cli import main
from adalora_scale.data.rows import load_raw
from adalora_scale.data.shown import shown_rows
from adalora_scale.tasks.registry import find_task, wanted_rows
from adalora_scale.training import run as running
from tests.conftest import ROOT

BASE = ROOT / "launch" / "quickstart" / "base_model"
PAIRS = [{"prompt": f"Count to {n}.", "completion": f" {n} <b>&\x1b[31m"} for n in range(4)]
CHAT = [
    {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day\nto you"}]},
    {"messages": [{"role": "user", "content": "bye"}, {"role": "assistant", "content": "see you"}]},
]
PREFERENCE = [{"prompt": "Say yes.", "chosen": " yes", "rejected": " no"}] * 2
LABELLED = [{"text": f"text {n}", "label": "ab"[n % 2]} for n in range(4)]
TWO_TEXTS = [{"sentence1": f"one {n}", "sentence2": "two", "label": n % 2} for n in range(4)]
TEXTS = [{"text": "a story " * (1 + 40 * n)} for n in range(3)]


@pytest.fixture
def show(tmp_path, monkeypatch, capfd, model_stays_on_disk):
    """Return what `preview --json` finds in rows, with overrides; no model may be loaded."""
    monkeypatch.chdir(tmp_path)
    datasets.disable_progress_bars()
    transformers.logging.disable_progress_bar()

    def run(rows, *arguments, json_out=True):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {
            "model": {"model_name_or_path": str(BASE)},
            "data": {"train": "rows.jsonl", "max_length": 64},
            "training": {"output_dir": "out", "max_steps": 10, "per_device_train_batch_size": 2},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
        capfd.readouterr()
        assert main(["preview", "--config", "run.yaml", *arguments, *(["--json"] if json_out else [])]) == 0
        out = capfd.readouterr().out
        assert not (tmp_path / "out").exists()
        return json.loads(out) if json_out else out

    return run


def text(row, trained):
    return "".join(piece["text"] for piece in row["pieces"] if piece["trained"] is trained)


def test_pairs_train_on_the_completion(show):
    found = show(PAIRS, "--rows", "2", "data.eval_fraction=0.25")
    train, evaluated = found["rows"][:2], found["rows"][2:]
    assert [row["place"] for row in found["rows"]] == ["train row 1", "train row 2", "eval row 1"]
    for row in [*train, *evaluated]:
        number = re.search(r"Count to (\d)", text(row, False))[1]
        assert text(row, True) == f" {number} <b>&\x1b[31m</s>"
        assert text(row, False) == f"<s> Count to {number}." or text(row, False) == f"<s>Count to {number}."
    assert found["counts"]["train_examples"] == 3 and found["counts"]["loss_tokens"] > 0


def test_conversations_train_on_the_assistant(show):
    row = show(CHAT, "--rows", "1", "data.chat_template=chatml")["rows"][0]
    assert "good day\nto you" in text(row, True) and "hello" not in text(row, True)
    assert "hello" in text(row, False)


def test_preferences_train_on_what_was_chosen(show):
    row = show(PREFERENCE, "--rows", "1", "data.format=preference")["rows"][0]
    assert "yes" in text(row, True) and " no" not in text(row, True) + text(row, False)


def test_classes_stand_behind_their_text(show):
    rows = show(LABELLED, "task=sequence_classification", "--rows", "2")["rows"]
    assert [row["label"] for row in rows] == ["a", "b"]
    pair = show(TWO_TEXTS, "task=sequence_classification", "--rows", "1")["rows"][0]
    assert "one 0" in text(pair, False) and "two" in text(pair, False) and pair["label"] == "0"


def test_what_is_cut_is_counted_and_named(show):
    found = show(TEXTS, "--rows", "3")
    assert found["counts"]["truncated"] == 2
    assert [row["at_limit"] for row in found["rows"]] == [False, True, True]
    said = show(TEXTS, json_out=False)
    assert "2 rows cut at data.max_length" in said and "as long as data.max_length=64 allows" in said


def test_packed_examples_are_shown_one_by_one(show):
    found = show(PAIRS, "data.packing=true", "--rows", "4")
    assert len(found["rows"]) == 4 and found["counts"]["packed_sequences"] < 4
    assert all(text(row, True).endswith("</s>") for row in found["rows"])


def test_mixtures_and_streams_are_shown_as_they_are_drawn(show):
    mixed = show(PAIRS, "data.train=[{path: rows.jsonl, weight: 3}, {path: ./rows.jsonl, weight: 1}]", "--rows", "4")
    assert mixed["notes"] == ["rows.jsonl: 75.0% of what is drawn", "./rows.jsonl: 25.0% of what is drawn"]
    assert len(mixed["rows"]) == 4
    streamed = show(PAIRS, "data.streaming=true", "data.shuffle_buffer=1", "--rows", "2")
    assert [text(row, True)[:2] for row in streamed["rows"]] == [" 0", " 1"]


def test_positions_that_the_model_lacks_are_named(show):
    assert show(PAIRS, "data.max_length=100000")["notes"][0].startswith("note: data.max_length=100000 is above the")


def test_the_page_is_escaped_and_asks_for_nothing(show, tmp_path):
    said = show(PAIRS, "--html", "page.html", json_out=False)
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "page.html is written" in said
    assert "<mark> 0 &lt;b&gt;&amp;\\x1b[31m&lt;/s&gt;</mark>" in page
    assert "<b>" not in page and "http" not in page.replace("http-equiv", "") and "<script" not in page


def test_text_on_a_pipe_has_marks_and_no_escape_sequences(show):
    said = show(PAIRS, "--rows", "1", json_out=False)
    assert "⟦ 0 <b>&\\x1b[31m</s>⟧" in said and "\x1b" not in said


def test_what_is_shown_is_what_the_trainer_gets(show, tmp_path):
    """A preview that renders by itself would show what should be trained, not what is."""
    show(CHAT, "data.chat_template=chatml")
    config = running_config(tmp_path, "data.chat_template=chatml")
    task = find_task(config.task)
    raw, tokenizer = load_raw(config.data, wanted_rows(task), seed=42), running.load_tokenizer(config)
    row = task.prepare(raw, tokenizer, config.data, seed=42).train[0]
    [shown] = shown_rows("train", row, 1, tokenizer, limit=64, label_names=None)
    assert shown.loss_tokens == sum(label != -100 for label in row["labels"][1:])
    assert shown.tokens == len(row["input_ids"])
    assert "".join(piece.text for piece in shown.pieces) == tokenizer.decode(row["input_ids"])


def running_config(folder, *overrides):
    from adalora_scale.config import load_config

    return load_config(folder / "run.yaml", overrides)


def test_a_run_begins_with_its_first_example_unless_told_not_to(show, tmp_path, capfd):
    long = [{"prompt": "line\n" * 60, "completion": " word" * 300}]
    show(long, "data.max_length=200")
    config = running_config(tmp_path, "data.max_length=200")
    capfd.readouterr()
    running.prepare(config)
    said = capfd.readouterr().out
    assert said.startswith("first example (") and len(said.splitlines()) <= 15 and "⟦" in said
    running.prepare(running_config(tmp_path, "data.max_length=200", "training.show_example=false"))
    assert "first example" not in capfd.readouterr().out
