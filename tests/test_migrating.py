"""docs/migrating.md: the keys it names are keys, here and in PEFT, and its configs are configs."""

import dataclasses
import re

import jsonschema
import pytest
import yaml

from adalora_scale.config import Fsdp2Config
from adalora_scale.config.foreign_keys import FOREIGN_KEYS
from adalora_scale.config.hints import hint, known_keys
from adalora_scale.config.json_schema import run_schema
from tests.conftest import ROOT
from tests.test_readme import blocks

PATH = ROOT / "docs" / "migrating.md"
PAGE = PATH.read_text(encoding="utf-8")
SCHEMA = run_schema()
SECTIONS = {name: SCHEMA["$defs"][f"{cls}Config"] for name, cls in
            {"model": "Model", "adalora": "AdaLora", "data": "Data", "engine": "Engine"}.items()}  # fmt: skip
SECTIONS["training"] = SCHEMA["properties"]["training"]
NAMED = re.compile(r"`(model|adalora|data|training|engine)\.([\w.]+)(?:: ([\w.-]+))?`")


def wrong_keys(page):
    """Return what of `section.key` and `section.key: value` a page names that no config takes."""
    found = []
    options = {field.name for field in dataclasses.fields(Fsdp2Config)}
    for section, key, value in NAMED.findall(page):
        if section == "engine" and key.startswith("config."):
            found += [] if key.removeprefix("config.") in options else [f"{section}.{key}"]
        elif key not in SECTIONS[section]["properties"]:
            found.append(f"{section}.{key}")
        elif value:
            check = jsonschema.Draft202012Validator(
                SECTIONS[section]["properties"][key] | {"$defs": SCHEMA.get("$defs", {})}
            )
            if not check.is_valid(yaml.safe_load(value)):
                found.append(f"{section}.{key}: {value}")
    return found


@pytest.mark.parametrize("name", ["migrating", "tuning", "claims", "troubleshooting", "resume"])
def test_our_keys_are_keys(name):
    """A key that was renamed would stay in a guide for ever."""
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert wrong_keys(page) == []


def test_wrong_keys_are_found():
    """The check above would pass on anything if it saw nothing."""
    page = "`adalora.r`, `data.format: sharegpt`, `engine.config.offload`, `adalora.target_r`, `data.format: alpaca`"
    assert wrong_keys(page) == ["adalora.r", "data.format: sharegpt", "engine.config.offload"]
    assert len(NAMED.findall(PAGE)) > 100


def test_the_table_has_peft_s_keys():
    """A key that a later PEFT brings or drops would be missing, and nobody would know what becomes of it."""
    peft = pytest.importorskip("peft")
    fields = {f.name for cls in (peft.LoraConfig, peft.AdaLoraConfig) for f in dataclasses.fields(cls)}
    table = PAGE.split("\n## PEFT")[1].split("\n## ")[0]
    named = [
        name for cell in re.findall(r"^\| (`[^|]*) \|", table, flags=re.M) for name in re.findall(r"`(\w+)`", cell)
    ]
    assert sorted(named) == sorted(fields)


def test_its_configs_are_configs():
    """What a newcomer copies would be refused."""
    check = jsonschema.Draft202012Validator(SCHEMA)
    found = [(line, yaml.safe_load(text)) for line, text in blocks("yaml", page=PATH)]
    assert len(found) == 2
    for line, tree in found:
        assert [f"line {line}: {error.message}" for error in check.iter_errors(tree)] == []


def test_hints_lead_where_the_page_leads():
    """Else the two drift apart, and one of them leads a newcomer to another key."""
    rows = re.findall(r"^\| (`[^|]*) \| ([^|]*) \|$", PAGE, flags=re.M)
    for theirs, ours in FOREIGN_KEYS.items():
        assert ours in known_keys(), ours
        assert any(re.search(rf"`{theirs}[`:]", row) and f"`{ours}" in here for row, here in rows), theirs


@pytest.mark.parametrize(
    ("section", "name", "said"),
    [
        (["target_r", "init_r"], "r", " Did you mean 'target_r'?"),
        (["target_r", "init_r"], "lora_rank", " Did you mean 'target_r'?"),
        (["model", "data", "training"], "base_model", " Did you mean 'model.model_name_or_path'?"),
        (["model", "data", "training"], "lora_dropout", " Did you mean 'adalora.lora_dropout'?"),
        (["warmup_steps"], "warmup_ratio", " Did you mean 'warmup_steps'?"),
    ],
)
def test_keys_of_other_tools_get_ours_as_a_hint(section, name, said):
    """`lora_rank` is like `local_rank` in its letters alone, and `r` is like nothing."""
    assert hint(name, section) == said
