"""`adalora-scale schema`: takes every recipe and no wrong key. `completion`: shells get a script."""

import copy
import dataclasses
import json
import subprocess
from typing import get_args, get_type_hints

import jsonschema
import pytest
import yaml

from adalora_scale.cli import main
from adalora_scale.config.json_schema import run_schema
from adalora_scale.config.options import TaskName
from adalora_scale.config.training_keys import MANAGED, OWN_KEYS, vendor_keys
from adalora_scale.tasks.registry import find_task
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "configs" / "recipes").glob("*.yaml"))
SCHEMA = run_schema()
CHECK = jsonschema.Draft202012Validator(SCHEMA)


def tree(path=RECIPES[0]):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid(path):
    """Else an editor underlines what runs."""
    assert [error.message for error in CHECK.iter_errors(tree(path))] == []


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        (None, "learning_rate", 1e-3),
        ("model", "model_name", "x"),
        ("data", "trian", "x"),
        ("adalora", "r", 8),
        ("training", "learing_rate", 1e-3),
        ("training", "max_length", 8),
        ("engine", "nmae", "ddp"),
        ("training", "max_steps", "ten"),
        ("model", "load_in_4bit", "nf4"),
        ("model", "torch_dtype", "bf16"),
        ("adalora", "score", "best"),
        ("data", "train", [{"pat": "x"}]),
        (None, "task", "causal"),
    ],
)
def test_a_wrong_key_or_value_is_not_valid(section, key, value):
    wrong = copy.deepcopy(tree())
    node = wrong if section is None else wrong.setdefault(section, {})
    node[key] = value
    assert not CHECK.is_valid(wrong)


def test_keys_of_another_task_are_not_valid():
    """SFTConfig's keys mean nothing to a classifier."""
    wrong = tree() | {"task": "sequence_classification"}
    wrong["training"] = wrong["training"] | {"padding_free": True}
    assert not CHECK.is_valid(wrong)
    assert CHECK.is_valid(wrong | {"task": "causal_lm"})


@pytest.mark.parametrize("task", get_args(TaskName))
def test_the_keys_read_as_text_are_those_of_the_class(task):
    """A key that is missing here would be refused although it works, an extra one accepted and then refused late."""
    cls = find_task(task).arguments_class()
    fields = {field.name for field in dataclasses.fields(cls)}
    assert set(vendor_keys(task)) >= fields
    assert set(vendor_keys(task)) <= fields | set(get_type_hints(cls)) | {"resume_from_checkpoint"}
    shown = set(SCHEMA["properties"]["training"]["properties"])
    assert fields - set(MANAGED) <= shown and set(OWN_KEYS) <= shown


def test_every_key_has_a_description():
    for definition in SCHEMA["$defs"].values():
        for name, entry in definition["properties"].items():
            assert entry.get("description"), name
    for name, entry in SCHEMA["properties"]["training"]["properties"].items():
        assert entry.get("description"), name


def test_the_verb_prints_it(capsys):
    assert main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_the_verbs(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert "preview" in script and "skip-preflight" in script
    if shell == "bash":
        (tmp_path / "c.sh").write_text(script)
        words = "COMP_WORDS=(adalora-scale prev); COMP_CWORD=1; _shtab_adalora_scale; echo ${COMPREPLY[@]}"
        said = subprocess.run(["bash", "-c", f". {tmp_path}/c.sh; {words}"], capture_output=True, text=True)
        assert said.stdout.split() == ["preview"]
