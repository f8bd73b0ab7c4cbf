"""docs/config.md: without this check a new key would stay undocumented, or an old default would be shown."""

import dataclasses
import re
from pathlib import Path

import pytest

from adalora_scale.config import PRESETS, AdaLoraConfig, DataConfig, EngineConfig, Fsdp2Config, ModelConfig

PAGE = (Path(__file__).parents[1] / "docs" / "config.md").read_text(encoding="utf-8")
WORDS = {
    "required": dataclasses.MISSING,
    "none": None,
    "the preset's": None,
    "the model's": None,
    "the tokenizer's": None,
}


@pytest.mark.parametrize(
    ("section", "config"),
    [
        ("model", ModelConfig),
        ("adalora", AdaLoraConfig),
        ("data", DataConfig),
        ("engine", EngineConfig),
        ("engine.config of FSDP2", Fsdp2Config),
    ],
)
def test_every_key_stands_in_the_page_with_its_default(section, config):
    """A key that is missing, extra, or shown with another default than the code's."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| (\w+) \| ([^|]+?) \| [^|]+ \|$", text, flags=re.M))
    rows.pop("key", None)
    fields = {field.name: field.default for field in dataclasses.fields(config)}
    assert list(rows) == list(fields)
    for name, shown in rows.items():
        default = fields[name]
        expected = WORDS.get(shown, shown)
        assert expected == default or (shown not in WORDS and shown == str(default).lower()), name


def test_the_presets_stand_in_the_page_with_their_values():
    """Else the page promises another default than the run has."""
    shown = {}
    header, *rows = re.findall(r"^\| (\w+ \| score .*|\w+ \| \w+ \| (?:adalora|lora) \| .*) \|$", PAGE, flags=re.M)
    for row in rows:
        values = dict(zip(header.split(" | "), row.split(" | "), strict=True))
        shown[values.pop("preset")] = values
    assert shown.keys() == PRESETS.keys()
    for name, values in shown.items():
        for target_r in (1, 8):
            config = AdaLoraConfig(preset=name, target_r=target_r)
            for key, text in values.items():
                factor, times, least = text.partition(" × target_r")
                expected = float(factor) * target_r if times else text
                if key == "init_r":
                    at_least = int(least.removeprefix(", at least ") or 0)
                    expected = max(round(expected), at_least, target_r + 1)
                assert str(getattr(config, key)) == str(expected) or getattr(config, key) == float(expected), (
                    name,
                    key,
                )
