"""`plan` on what the project ships asks nobody: a login node may have no network, and questions take minutes."""

import socket
import time

import huggingface_hub.constants as hub
import pytest

from adalora_scale.cli import main
from adalora_scale.cluster.plan.shapes import SHAPES
from adalora_scale.config import load_config
from tests.conftest import ROOT

RECIPES = [path for path in sorted((ROOT / "configs" / "recipes").glob("*.yaml")) if "stories260k" not in path.name]


@pytest.fixture
def asked(monkeypatch):
    """Every question to a network; each fails, as with the network cut. The hub is not said to be offline."""
    questions = []

    def refuse(*arguments, **options):
        questions.append(arguments)
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    return questions


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_plan_of_a_shipped_recipe_asks_no_hub(recipe, asked, capsys):
    """Else 48 questions that nobody answers stand between 12 s of work and its answer."""
    model = load_config(recipe).model.model_name_or_path
    assert model in SHAPES or (ROOT / model).is_dir()
    command = ["plan", "--config", str(recipe), "--gpus", "2", "--gpu", "h200", "data.max_length=64"]
    code = main([*command, f"model.model_name_or_path={ROOT / model if (ROOT / model).is_dir() else model}"])
    output = capsys.readouterr()
    if recipe.stem == "glue_sst2_deberta":  # its attention's shapes depend on values
        assert code == 2 and output.err.startswith("error: cannot plan a deberta-v2")
    else:
        assert code in (0, 1) and "sequence" in output.out, output.err
    assert not asked


def test_a_model_that_is_not_shipped_is_asked_for(asked, capsys, monkeypatch):
    """Else the count above would be zero whatever plan does."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between the hub's tries
    recipe = ROOT / "configs" / "recipes" / "gsm8k_llama3_8b.yaml"
    assert main(["plan", "--config", str(recipe), "--gpus", "2", "model.model_name_or_path=nobody/nothing"]) == 2
    assert asked and "nobody/nothing" in capsys.readouterr().err
