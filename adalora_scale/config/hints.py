"""Where a key that nobody knows here belongs: in another section, or under a name like it."""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import importlib.util
from collections.abc import Iterable
from pathlib import Path

from adalora_scale.config.options import AdaLoraConfig, DataConfig, EngineConfig, Fsdp2Config, ModelConfig, RunConfig
from adalora_scale.errors import nearest

_SECTIONS = {
    "": RunConfig,
    "model.": ModelConfig,
    "data.": DataConfig,
    "adalora.": AdaLoraConfig,
    "engine.": EngineConfig,
    "engine.config.": Fsdp2Config,
}
_ARGUMENTS = (("transformers", "training_args.py"), ("trl", "trainer/sft_config.py"))


def hint(name: str, section: Iterable[str]) -> str:
    """Return a sentence that leads from an unknown key to the one that was meant; empty where none is near.

    Args:
        name: the last word of the unknown key.
        section: the keys of the section that it stood in.
    """
    section = list(section)
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

    The classes of transformers and TRL are read as text: importing them takes seconds, and a misspelt key is answered
    at once.
    """
    ours = [prefix + entry.name for prefix, cls in _SECTIONS.items() for entry in dataclasses.fields(cls)]
    theirs = [f"training.{name}" for package, file in _ARGUMENTS for name in _fields(package, file)]
    return tuple(dict.fromkeys([*ours, *theirs]))


def _fields(package: str, file: str) -> list[str]:
    spec = importlib.util.find_spec(package)
    path = Path(spec.origin).parent / file if spec and spec.origin else Path()
    if not path.is_file():
        return []
    classes = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    entries = [entry for node in classes for entry in node.body if isinstance(entry, ast.AnnAssign)]
    return [entry.target.id for entry in entries if isinstance(entry.target, ast.Name)]
