"""What the tests' marks say of the tables' cells; nothing is run.

    @pytest.mark.shows("training", task="causal_lm", engine="{engine}", base="float32")
    @pytest.mark.refuses("training", task="causal_lm", engine=tuple(ENGINES), base="other …", because="GPTQ: …")

A value may be a tuple of values, hold parameters of the test in braces, or be a function of a dict of the parameters;
None is no cell.
"""

from __future__ import annotations

import contextlib
import io
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.support.tables import TABLES, Table

Cell = tuple[str, ...]


@dataclass
class Found:
    """What is known of one cell."""

    default: set[str] = field(default_factory=set)
    """Tests that run every day."""
    full: set[str] = field(default_factory=set)
    """Tests of --full."""
    refused: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    """Reason → tests that expect the refusal."""


Cells = dict[str, dict[Cell, Found]]


def collect(folder: Path = ROOT / "tests") -> Cells:
    """Return table → cell → its tests.

    Raises:
        ValueError: a mark is no cell of its table, or tests contradict each other.
        RuntimeError: pytest cannot collect the tests.
    """
    seen = _Seen()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = pytest.main([*_marked(folder), "--collect-only", "-q", "-p", "no:cacheprovider"], plugins=[seen])
    if code != pytest.ExitCode.OK:
        raise RuntimeError(f"pytest cannot collect the tests:\n{said.getvalue()}")
    return cells_of(seen.items)


def cells_of(items: list[pytest.Item]) -> Cells:
    """Return what collected tests show; raises as `collect`."""
    cells: Cells = {name: defaultdict(Found) for name in TABLES}
    for item in items:
        name = item.nodeid.partition("[")[0]
        level = "full" if item.get_closest_marker("full") else "default"
        parameters = dict(item.callspec.params) if hasattr(item, "callspec") else {}
        for kind in ("shows", "refuses"):
            for mark in item.iter_markers(kind):
                try:
                    (table,), axes = mark.args, dict(mark.kwargs)
                    because = axes.pop("because") if kind == "refuses" else ""
                    for cell in _cells(TABLES[table], axes, parameters):
                        found = cells[table][cell]
                        tests = found.refused[because] if because else getattr(found, level)
                        tests.add(name)
                except (KeyError, ValueError) as error:
                    raise ValueError(f"{item.nodeid}: {kind}{mark.args} {mark.kwargs}: {error}") from None
    for table, named in cells.items():
        for cell, found in named.items():
            if found.refused and (found.default or found.full):
                raise ValueError(f"{table}, {cell}: shown by {found.default | found.full}, refused by {found.refused}")
    return cells


def _cells(table: Table, axes: dict[str, Any], parameters: dict[str, Any]) -> Iterator[Cell]:
    if axes.keys() != table.axes.keys():
        raise ValueError(f"gives {', '.join(axes)}, not {', '.join(table.axes)}")
    values = [_values(axes[axis], parameters) for axis in table.axes]
    for cell in product(*values):
        for axis, value in zip(table.axes, cell, strict=True):
            if value not in table.axes[axis]:
                raise ValueError(f"{axis} is {value!r}, not one of {', '.join(table.axes[axis])}")
        yield cell


def _values(given: str | tuple[str, ...] | Callable[[dict[str, Any]], Any], parameters: dict[str, Any]) -> list[str]:
    value = given(parameters) if callable(given) else given
    values = [] if value is None else [value] if isinstance(value, str) else value
    return [one.format(**parameters) for one in values]


def _marked(folder: Path) -> list[str]:
    """Name the files that have marks: collecting the others is only slow."""
    files = sorted(folder.rglob("test_*.py"))
    return [str(file) for file in files if any(f"mark.{kind}(" in file.read_text() for kind in ("shows", "refuses"))]


class _Seen:
    def __init__(self) -> None:
        self.items: list[pytest.Item] = []

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.items = list(session.items)
