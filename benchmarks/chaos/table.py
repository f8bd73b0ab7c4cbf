"""Results as a table for people and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.chaos.rounds import Result

VERDICTS = ("equal", "refused", "failed")


def markdown(results: Sequence[Result]) -> str:
    """Return rows of attacks, columns of engines, and in a cell how many rounds ended equal / refused / failed.

    A round with three attacks stands in three rows, and once in the last. One that ended at its second attack does not
    stand in the third's row; where it failed there, neither in the first's, which had gone well.
    """
    engines = list(dict.fromkeys(result.plan.engine for result in results))
    attacks = list(dict.fromkeys(name for result in results for name in result.plan.attacks))
    lines = [f"| equal / refused / failed | {' | '.join(engines)} | all |", "|---|" + "---|" * (len(engines) + 1)]
    for label, chosen in [
        *((name, [r for r in results if name in _counted(r)]) for name in sorted(attacks)),
        ("**rounds**", list(results)),
    ]:
        cells = [_cell([r for r in chosen if r.plan.engine == engine]) for engine in engines]
        lines.append(f"| {label} | {' | '.join([*cells, _cell(chosen)])} |")
    return "\n".join(lines)


def tree(results: Sequence[Result], *, command: str, versions: dict[str, str]) -> dict[str, Any]:
    """Return everything as JSON values; logs stay behind, in the folder that the command names."""
    rounds = [asdict(result) for result in results]
    for entry in rounds:
        entry["seconds"] = round(entry["seconds"], 1)
        entry["log"] = "/".join(entry["log"].split("/")[-3:])
    tally = Counter(result.verdict for result in results)
    return {"command": command, "versions": versions, "tally": dict(tally), "rounds": rounds}


def _counted(result: Result) -> tuple[str, ...]:
    if result.at is None:
        return result.plan.attacks
    return result.plan.attacks[result.at if result.verdict == "failed" else 0 : result.at + 1]


def _cell(results: Sequence[Result]) -> str:
    tally = Counter(result.verdict for result in results)
    return " / ".join(str(tally[verdict]) for verdict in VERDICTS) if results else "–"
