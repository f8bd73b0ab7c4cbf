"""The figures that recipes for one card state are what `adalora-scale plan` says of them."""

import json
import re

import pytest

from adalora_scale.cli import main
from tests.conftest import ROOT

RECIPES = {path.stem: path for path in sorted((ROOT / "configs" / "recipes").glob("*_[28][40]gb.yaml"))}
STATED = re.compile(
    r"# Plan: ([\d.]+) GB of ([\d.]+) GB, largest micro-batch (\d+), ([\d,]+) tokens/s \((--gpus 1 --gpu \w+)\)"
)
QUICK = "gsm8k_gemma3_1b_24gb"


def test_cards_and_families_of_models_are_all_here():
    """A recipe without a plan would not be tested below."""
    for family in ("llama3_1", "qwen", "mistral", "gemma"):
        assert [name for name in RECIPES if family in name]
    assert {name[-4:] for name in RECIPES} == {"24gb", "80gb"}
    for path in RECIPES.values():
        assert STATED.search(path.read_text()), path
        assert "# Expected result: " in path.read_text()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == QUICK else pytest.mark.full) for name in RECIPES]
)
def test_the_plan_in_the_recipe_is_the_plan(name, capsys):
    """Else people rent, or buy, the wrong card."""
    device, room, micro_batch, tokens, options = STATED.search(RECIPES[name].read_text()).groups()
    assert main(["plan", "--config", str(RECIPES[name]), *options.split(), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    engine = found["engines"][found["engine"]]
    assert engine["fits"] and engine["device_bytes"] / 1e9 == pytest.approx(float(device), rel=0.02)
    assert found["hardware"]["gpu"]["memory"] / 1e9 == pytest.approx(float(room), abs=0.01)
    assert engine["largest_micro_batch"] == pytest.approx(int(micro_batch), abs=2)
    assert engine["speed"]["tokens_per_s"] == pytest.approx(float(tokens.replace(",", "")), rel=0.02)
