"""What every trial of a learning rate came to: how much the rate decides, beside the method."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.quality.cell import DIVERGED, Results
from benchmarks.quality.search import tuning_cells
from benchmarks.quality.tasks import QualityTask


def rates_markdown(
    tasks: Sequence[QualityTask],
    methods: Sequence[str],
    budgets: Sequence[int],
    results: Results,
    labels: dict[str, str],
) -> str:
    """Return a table for each list of learning rates: validation loss of the one trial at each, the lowest marked.

    Args:
        tasks: those with the same learning rates stand in one table.
        methods: a row for each task, budget, scale and method whose trials are all there.
        budgets: as ranks of LoRA.
        results: where the trials are.
        labels: what the table calls a method.
    """
    tables: dict[tuple[float, ...], list[str]] = {}
    for task in tasks:
        known = results.of(task.name)
        for target_r in budgets:
            for method in methods:
                cells = tuning_cells(task, method, target_r)
                if not all(cell in known for cell in cells):
                    continue
                losses = {cell: known[cell]["validation"]["loss"] for cell in cells}
                best = min(losses.values())
                for scale in task.scales:
                    row = [f"{task.name}, r = {target_r}", labels[method], f"{scale:g}"]
                    row += [_shown(loss, best) for cell, loss in losses.items() if cell.scale == scale]
                    tables.setdefault(task.learning_rates, []).append("| " + " | ".join(row) + " |")
    pages = []
    for rates, rows in tables.items():
        head = ["task", "method", "scale", *(f"{rate:g}" for rate in rates)]
        pages.append("\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *rows, ""]))
    return "\n".join(pages)


def _shown(loss: float, best: float) -> str:
    if loss >= DIVERGED:
        return "diverged"
    return f"**{loss:.3f}**" if loss == best else f"{loss:.3f}"
