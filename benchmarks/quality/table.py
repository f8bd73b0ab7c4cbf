"""The table, from the cells that are there."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from benchmarks.quality.cell import Results
from benchmarks.quality.search import final_cells
from benchmarks.quality.statistics import paired, spread
from benchmarks.quality.tasks import QualityTask

REFERENCE = "lora"
_MOST_SEEDS = 1000


def rows_of(
    tasks: Sequence[QualityTask],
    methods: Sequence[str],
    budgets: Sequence[int],
    seeds: int,
    split: str,
    results: Results,
    against: str | None = None,
) -> list[dict[str, Any]]:
    """Return one row a (task, budget, method) of which at least `seeds` seeds are there.

    All of its seeds count, up to the first that is missing; a difference is of those that the reference has, too. The
    reference is each task's own, or the method `against`.
    """
    rows: list[dict[str, Any]] = []
    for task in tasks:
        known, base = results.of(task.name), against or task.reference
        for target_r in budgets:
            reference: list[float] = []
            for method in (base, *(m for m in methods if m != base and task.runs(m))):
                wanted = final_cells(task, method, target_r, _MOST_SEEDS, known)
                cells = [known[cell] for cell in itertools.takewhile(known.__contains__, wanted)]
                if len(cells) < max(seeds, 1):
                    continue
                losses = [cell[split]["loss"] for cell in cells]
                if method == base:
                    reference = losses
                best = wanted[0]
                row: dict[str, Any] = {
                    "task": task.name,
                    "target_r": target_r,
                    "method": method,
                    "reference": base,
                    "learning_rate": best.learning_rate,
                    "scale": best.scale,
                    "seeds": len(cells),
                    "losses": losses,
                    "accuracies": [cell[split]["accuracy"] for cell in cells],
                    "parameters": [cell["parameters"] / cell["budget"] for cell in cells],
                }
                if reference and method != base:
                    both = min(len(losses), len(reference))
                    difference = paired(losses[:both], reference[:both])
                    row["difference"] = [difference.mean, difference.low, difference.high]
                    row["pairs"] = difference.pairs
                rows.append(row)
    return rows


def markdown(rows: Sequence[dict[str, Any]], labels: dict[str, str]) -> str:
    """Return the rows as tables, one a task and budget; lower losses are better."""
    lines: list[str] = []
    place = None
    for row in rows:
        if place != (row["task"], row["target_r"]):
            place = row["task"], row["target_r"]
            lines += [
                "",
                f"### {place[0]}, parameters of LoRA r = {place[1]}",
                "",
                f"| method | lr, scale | loss | accuracy | against {labels[row['reference']]}, 95 % "
                "| parameters / budget | seeds |",
                "|---|---|---|---|---|---|---|",
            ]
        difference = _difference(row)
        shares, seeds = row["parameters"], str(row["seeds"])
        if row.get("pairs", row["seeds"]) != row["seeds"]:
            seeds += f", {row['pairs']} pairs"
        lines.append(
            f"| {labels[row['method']]} | {row['learning_rate']:g}, {row['scale']:g} | {spread(row['losses'])} | "
            f"{spread(row['accuracies'])} | {difference} | {min(shares):.3f} to {max(shares):.3f} | {seeds} |"
        )
    return "\n".join(lines).strip() + "\n"


def short_markdown(rows: Sequence[dict[str, Any]], method: str) -> str:
    """Return one table of `method` beside LoRA, a row for every task and budget at which both were run."""
    lines = ["| task | parameters of LoRA r | LoRA | ours | difference, 95 % | seeds |", "|---|---|---|---|---|---|"]
    reference = {(row["task"], row["target_r"]): row for row in rows if row["method"] == REFERENCE == row["reference"]}
    for row in rows:
        if row["method"] == method and row["reference"] == REFERENCE and "difference" in row:
            lora = reference[row["task"], row["target_r"]]
            lines.append(
                f"| {row['task']} | {row['target_r']} | {spread(lora['losses'])} | {spread(row['losses'])} | "
                f"{_difference(row)} | {row['pairs']} |"
            )
    return "\n".join(lines) + "\n"


def _difference(row: dict[str, Any]) -> str:
    """Return a paired difference with its interval, and a word where the interval leaves zero out."""
    if "difference" not in row:
        return "–"
    mean, low, high = row["difference"]
    sure = "" if low <= 0 <= high else (" **ahead**" if mean < 0 else " **behind**")
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]{sure}"
