"""Which cells there are: first every trial of a setting on the validation split, then the best one on every seed."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from benchmarks.quality.cell import Cell, Results
from benchmarks.quality.tasks import QualityTask

Known = Mapping[Cell, dict[str, Any]]
"""A task's results by cell."""
TUNING_SEED = 1000
"""Not one of the seeds that count."""


def tuning_cells(task: QualityTask, method: str, target_r: int) -> list[Cell]:
    """Return the trials of a method: the same learning rates and scales for every method."""
    return [
        Cell(task.name, method, target_r, rate, TUNING_SEED, False, scale)
        for scale, rate in itertools.product(task.scales, task.learning_rates)
    ]


def best_trial(task: QualityTask, method: str, target_r: int, known: Known) -> Cell | None:
    """Return the trial with the lowest validation loss; None before every trial is there."""
    cells = tuning_cells(task, method, target_r)
    if not all(cell in known for cell in cells):
        return None
    return min(cells, key=lambda cell: known[cell]["validation"]["loss"])


def final_cells(task: QualityTask, method: str, target_r: int, seeds: int, known: Known) -> list[Cell]:
    """Return the chosen setting on every seed; empty before it is chosen."""
    best = best_trial(task, method, target_r, known)
    if best is None:
        return []
    return [replace(best, seed=seed, final=True) for seed in range(seeds)]


def missing(
    tasks: Sequence[QualityTask], methods: Sequence[str], budgets: Sequence[int], seeds: int, results: Results
) -> Iterator[Cell]:
    """Yield what is to be run next, tuning before what depends on it; ask again after each."""
    for target_r in budgets:
        for task in tasks:
            known = results.of(task.name)
            for method in filter(task.runs, methods):
                cells = tuning_cells(task, method, target_r) + final_cells(task, method, target_r, seeds, known)
                yield from (cell for cell in cells if cell not in known)
