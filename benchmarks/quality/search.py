"""Which cells there are: first every learning rate on the validation split, then the best one on every seed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benchmarks.quality.cell import Cell, Results
from benchmarks.quality.tasks import QualityTask

Known = Mapping[Cell, dict[str, Any]]
"""A task's results by cell."""
TUNING_SEED = 1000
"""Not one of the seeds that count."""


def tuning_cells(task: QualityTask, method: str, target_r: int) -> list[Cell]:
    """Return the trials of a method: one learning rate each, the same rates for every method."""
    return [Cell(task.name, method, target_r, rate, TUNING_SEED, False) for rate in task.learning_rates]


def best_rate(task: QualityTask, method: str, target_r: int, known: Known) -> float | None:
    """Return the learning rate with the lowest validation loss; None before every trial is there."""
    cells = tuning_cells(task, method, target_r)
    if not all(cell in known for cell in cells):
        return None
    return min(cells, key=lambda cell: known[cell]["validation"]["loss"]).learning_rate


def final_cells(task: QualityTask, method: str, target_r: int, seeds: int, known: Known) -> list[Cell]:
    """Return the chosen setting on every seed; empty before it is chosen."""
    rate = best_rate(task, method, target_r, known)
    if rate is None:
        return []
    return [Cell(task.name, method, target_r, rate, seed, True) for seed in range(seeds)]


def missing(
    tasks: Sequence[QualityTask], methods: Sequence[str], budgets: Sequence[int], seeds: int, results: Results
) -> Iterator[Cell]:
    """Yield what is to be run next, tuning before what depends on it; ask again after each."""
    for target_r in budgets:
        for task in tasks:
            known = results.of(task.name)
            for method in methods:
                cells = tuning_cells(task, method, target_r) + final_cells(task, method, target_r, seeds, known)
                yield from (cell for cell in cells if cell not in known)
