"""The shipped recipes: what each is for, what it needs, and its text as it works where the package is installed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from adalora_scale.errors import UserError, nearest

_FOLDER = Path(__file__).with_name("shipped")
_HARDWARE = "Hardware:"
# In the repository the quickstart's files are found beside its scripts, which are not in a wheel.
_QUICKSTART = re.compile(r"(?<=: )launch/quickstart/(\S+)")
_INSTALLED = Path(__file__).with_name("quickstart")


@dataclass(frozen=True)
class Recipe:
    """One shipped config."""

    name: str
    what: str
    """One line: the first of its comments."""
    hardware: str
    """One line: the comment that begins with `Hardware:`."""
    text: str
    """YAML that can be trained from any folder, if the model and the data it names are at hand."""


def recipes() -> list[Recipe]:
    """Return all of them, by name."""
    return [_read(path) for path in sorted(_FOLDER.glob("*.yaml"))]


def recipe(name: str) -> Recipe:
    """Return one; its file's name, with or without `.yaml`.

    Raises:
        UserError: there is none of that name.
    """
    known = {path.stem: path for path in _FOLDER.glob("*.yaml")}
    if (path := known.get(name.removesuffix(".yaml"))) is None:
        raise UserError(f"there is no recipe '{name}'.{nearest(name, known)} `adalora-scale recipes` lists all.")
    return _read(path)


def _read(path: Path) -> Recipe:
    text = path.read_text(encoding="utf-8")
    comments = [line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#")]
    hardware = next((line.removeprefix(_HARDWARE).strip() for line in comments if line.startswith(_HARDWARE)), "")
    text = _QUICKSTART.sub(lambda found: json.dumps(str(_INSTALLED / found[1]), ensure_ascii=False), text)
    return Recipe(path.stem, comments[0].rstrip("."), hardware.rstrip("."), text)
