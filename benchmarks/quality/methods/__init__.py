"""The methods by name: one file each, which binds `METHODS`, a tuple of the methods in it."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from benchmarks.quality.method import Method


def all_methods() -> dict[str, Method]:
    """Return every method by its name, in the order of the files' names."""
    found: dict[str, Method] = {}
    for path in sorted(Path(__file__).parent.glob("[!_]*.py")):
        for method in import_module(f"{__name__}.{path.stem}").METHODS:
            found[method.name] = method
    return found
