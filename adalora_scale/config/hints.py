"""Where a key that nobody knows here belongs: in another section, under a name like it, or under our name for it."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable
from typing import get_args

from adalora_scale.config.foreign_keys import FOREIGN_KEYS
from adalora_scale.config.options import (
    AdaLoraConfig,
    DataConfig,
    EngineConfig,
    Fsdp2Config,
    ModelConfig,
    RunConfig,
    TaskName,
)
from adalora_scale.config.training_keys import MANAGED, OWN_KEYS, refuse_managed, vendor_keys
from adalora_scale.errors import UserError, nearest

_SECTIONS = {
    "": RunConfig,
    "model.": ModelConfig,
    "data.": DataConfig,
    "adalora.": AdaLoraConfig,
    "engine.": EngineConfig,
    "engine.config.": Fsdp2Config,
}


def hint(name: str, section: Iterable[str]) -> str:
    """Return a sentence that leads from an unknown key to the one that was meant; empty where none is near.

    Args:
        name: the last word of the unknown key.
        section: the keys of the section that it stood in.
    """
    section = list(section)
    elsewhere = [key for key in known_keys() if key.rpartition(".")[2] == name]
    if elsewhere and name not in section:  # a key of that very name is what was meant
        return f" Did you mean '{elsewhere[0]}'?"
    if ours := FOREIGN_KEYS.get(name):
        leaf = ours.rpartition(".")[2]
        return f" Did you mean '{leaf if leaf in section else ours}'?"
    if close := nearest(name, section, cutoff=0.8):
        return close
    by_name: dict[str, str] = {}  # ours win over those of transformers that are set through them
    for key in known_keys():
        by_name.setdefault(key.rpartition(".")[2], key)
    for word in section:
        by_name.pop(word, None)
    if found := difflib.get_close_matches(name, by_name, n=1, cutoff=0.8):
        return f" Did you mean '{by_name[found[0]]}'?"
    return nearest(name, section)


@functools.cache
def known_keys() -> tuple[str, ...]:
    """Return every key of a run's YAML file as section.key, those of `training` too.

    The classes of transformers and TRL are read as text (`training_keys`).
    """
    ours = [prefix + entry.name for prefix, cls in _SECTIONS.items() for entry in dataclasses.fields(cls)]
    names = [
        *OWN_KEYS,
        *(name for task in get_args(TaskName) for name in vendor_keys(task) or () if name not in MANAGED),
    ]
    return tuple(dict.fromkeys([*ours, *(f"training.{name}" for name in names)]))


def check_training_names(config: RunConfig) -> None:
    """Refuse keys of `training:` that the task's arguments do not have, without importing these.

    Raises:
        UserError: naming the first one and what was meant, or the section that it belongs to.
    """
    if (known := vendor_keys(config.task)) is None:
        return  # whoever converts the section looks again
    names = [name for name in (*known, *OWN_KEYS) if name not in MANAGED]
    for key in config.training:
        refuse_managed(key)
        if key not in names:
            raise UserError(f"unknown key 'training.{key}'.{hint(key, names)}")
