"""A run's folder as its records tell it: finished, stopped on the way, or of a trainer that wrote no run.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from adalora_scale.errors import UserError
from adalora_scale.messages import quoted
from adalora_scale.reading.folders import own_file
from adalora_scale.reading.json_text import as_object, parse_json, read_bytes, read_object
from adalora_scale.report.names import METRICS_NAME, RANKS_NAME, RUN_NAME, SCORES_NAME
from adalora_scale.report.score_lines import FORMAT

_MOST_BYTES = 2**29


@dataclass(frozen=True)
class Ranks:
    """A line of ranks.jsonl."""

    step: int
    budget: int
    spent: int | None
    ranks: dict[str, int]


@dataclass(frozen=True)
class Scored:
    """What scores.jsonl says of the matrices, and its lines."""

    score: str
    unit: str
    """What the budget counts: params or triplets."""
    r: int
    every: int
    """Every how many allocations were recorded."""
    modules: list[str]
    sides: list[tuple[int, int]]
    lines: list[dict[str, Any]]
    source: Path

    @property
    def sizes(self) -> dict[str, int]:
        """Module → parameters of one triplet (in + out + 1)."""
        return {name: sum(sides) + 1 for name, sides in zip(self.modules, self.sides, strict=True)}


@dataclass(frozen=True)
class Run:
    """A run."""

    directory: Path
    metrics: list[dict[str, Any]]
    """Lines of metrics.jsonl, each with a step."""
    allocations: list[Ranks]
    scored: Scored | None
    summary: dict[str, Any] | None
    """run.json; None of a run that has not ended."""
    notes: list[str] = field(default_factory=list)
    """What is missing, a sentence each."""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.directory.resolve().name

    @property
    def ranks(self) -> dict[str, int]:
        """Module → kept triplets now."""
        said = (self.summary or {}).get("ranks")
        if isinstance(said, dict) and said and all(_is_whole(rank) for rank in said.values()):
            return said
        return self.allocations[-1].ranks if self.allocations else {}

    @property
    def last_step(self) -> int | None:
        """The last step that a line speaks of."""
        steps = [line["step"] for line in self.metrics] + [line.step for line in self.allocations]
        return max(steps, default=None)

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of every line of metrics.jsonl that has a number under `key`."""
        found = [(line["step"], number(line.get(key))) for line in self.metrics]
        return [(step, value) for step, value in found if value is not None]


def read_run(directory: Path) -> Run:
    """Read a run's folder.

    Raises:
        UserError: it holds no run, or a file of it is damaged.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder; pass a run's output_dir.")
    if not any((directory / name).is_file() for name in (RUN_NAME, METRICS_NAME)):
        parent = directory.absolute().parent
        near = f" Did you mean {directory.parent}?" if (parent / METRICS_NAME).is_file() else ""
        raise UserError(f"{directory} is no run: it has no {METRICS_NAME} and no {RUN_NAME}; pass an output_dir.{near}")
    metrics = [line for line in _lines(directory, METRICS_NAME) if _is_whole(line.get("step"))]
    allocations = [_ranks(line, directory / RANKS_NAME) for line in _lines(directory, RANKS_NAME)]
    summary, notes = _summary(directory, metrics)
    scored = read_scored(directory)
    if scored is None and allocations:
        notes.append(f"no {SCORES_NAME}: why matrices kept their ranks was not recorded")
    if not allocations:
        notes.append("no allocation yet: every matrix has its first rank")
    return Run(directory, metrics, allocations, scored, summary, notes)


def read_scored(directory: Path) -> Scored | None:
    """Read `scores.jsonl` of a run; None where there is none, or no allocation in it.

    Raises:
        UserError: it is damaged, or of a newer version.
    """
    lines, path = _lines(directory, SCORES_NAME), directory / SCORES_NAME
    if not lines:
        return None
    first = lines[0]
    if first.get("format") != FORMAT:
        raise UserError(f"{path} has format {quoted(first.get('format'))}, not {FORMAT}; another version wrote it.")
    try:
        modules = [str(name) for name in first["modules"]]
        sides = [(int(a), int(b)) for a, b in first["sides"]]
        r, every = int(first["r"]), int(first["every"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{path}: its first line does not name the matrices; was the file edited?") from None
    if len(sides) != len(modules) or r < 1 or min(map(min, sides), default=0) < 1:
        raise UserError(f"{path}: its first line does not name the matrices; was the file edited?")
    allocations = [line for line in lines[1:] if _is_whole(line.get("step")) and _is_whole(line.get("budget"))]
    return Scored(str(first.get("score")), str(first.get("unit")), r, every, modules, sides, allocations, path)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**62


def number(value: Any) -> float | None:
    """Return a finite JSON number; None for everything else, true and false too."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
    return float(value) if known else None


def flat(tree: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Return dotted key → value of nested objects."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            found |= flat(value, f"{before}{key}.")
        else:
            found[f"{before}{key}"] = value
    return found


def _summary(directory: Path, metrics: list[dict[str, Any]]) -> tuple[dict[str, Any] | None, list[str]]:
    path = directory / RUN_NAME
    if not path.is_file():
        return None, [f"no {RUN_NAME}: the run has not ended, or another trainer made it"]
    summary = read_object(own_file(path, directory), limit=_MOST_BYTES, finite=False)
    last = max((line["step"] for line in metrics), default=None)
    # Beside lines that were written later, and do not reach its end, it is what an overwritten run left.
    whole = last is None or last == summary.get("total_step")
    if not whole and path.stat().st_mtime < (directory / METRICS_NAME).stat().st_mtime:
        return None, [f"{RUN_NAME} is an earlier run's, which this one overwrites: left out"]
    return summary, []


def _ranks(line: dict[str, Any], path: Path) -> Ranks:
    ranks, step, budget, spent = (line.get(key) for key in ("ranks", "step", "budget", "spent"))
    if not (isinstance(ranks, dict) and _is_whole(step) and _is_whole(budget)):
        raise UserError(f"{path} holds a line that is no allocation; was the file edited?")
    if not ranks or not all(_is_whole(rank) for rank in ranks.values()):
        raise UserError(f"{path} holds ranks that are no whole numbers; was the file edited?")
    return Ranks(step, budget, spent if _is_whole(spent) else None, ranks)


def _lines(directory: Path, name: str) -> list[dict[str, Any]]:
    """Return the objects of a file of lines; the last may be half written."""
    path = directory / name
    if not path.is_file():
        return []
    text = read_bytes(own_file(path, directory), limit=_MOST_BYTES).decode("utf-8", errors="replace")
    whole = text.split("\n")[:-1]
    named = [(f"{path}, line {place}", line) for place, line in enumerate(whole, start=1)]
    return [as_object(parse_json(line, name, finite=False), name) for name, line in named]
