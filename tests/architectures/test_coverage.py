"""The coverage command on one architecture of each kind, every day, and on all of them with --full."""

import json
import subprocess
import sys

import pytest

from tests.architectures.table import counts, markdown
from tests.conftest import ROOT

OF_EACH_KIND = ["llama", "bert", "mixtral", "lfm2"]  # dense, encoder, experts, hybrid


def cover(folder, *options):
    found = folder / "found.json"
    result = subprocess.run(
        [sys.executable, "tests/coverage.py", "--json", str(found), *options], cwd=ROOT, capture_output=True, text=True
    )
    return result, json.loads(found.read_text())


def wrong(found):
    return {name: entry["checks"] for name, entry in found.items() if "wrong" in str(entry["checks"])}


@pytest.mark.shows(
    "training",
    task=("causal_lm", "sequence_classification"),
    engine="one process",
    base=("float32", "4-bit, made while loading"),
)
@pytest.mark.shows("training", task=("causal_lm", "sequence_classification"), engine="fsdp2", base="float32")
@pytest.mark.shows("exports", form="peft-lora", of="over a 4-bit base")
def test_one_architecture_of_each_kind_is_right_or_refused(tmp_path):
    result, found = cover(tmp_path, "--only", *OF_EACH_KIND)
    assert not wrong(found), result.stdout
    assert result.returncode == 0, result.stdout + result.stderr
    assert sorted(found) == sorted(OF_EACH_KIND)
    for name in ("llama", "bert", "mixtral"):
        words = [word for word, _ in found[name]["checks"].values()]
        assert words.count("right") == len(words) >= 4, found[name]


@pytest.mark.full
@pytest.mark.timeout(5400)
def test_no_architecture_is_wrong(tmp_path):
    page = tmp_path / "coverage.md"
    page.write_text((ROOT / "docs" / "coverage.md").read_text())
    result, found = cover(tmp_path, "--page", str(page))
    assert not wrong(found), result.stdout
    assert result.returncode == 0, result.stdout + result.stderr
    assert sum(not entry["built"] for entry in found.values()) > 200


def test_the_table_shows_what_is_wrong_and_why():
    found = {
        "x": {"kind": "causal", "built": "", "checks": {"train": ["wrong", "a | b"], "4-bit": ["right", ""]}},
        "y": {"kind": "causal", "built": "needs timm", "checks": {}},
    }
    shown = markdown(found)
    assert "| `x` | causal | **wrong** | – | right | – | – |" in shown
    assert r"- wrong: a \| b – x (train)" in shown and "- `y`: needs timm" in shown
    assert counts(found).startswith("1 of 2 architectures; verdicts: 1 right, 0 refused, 1 wrong.")
