"""Why a matrix has its rank: its triplets' scores against the cut of an allocation, and the price of the next one.

Triplets are bought in the order of score per cost (`adalora/allocation.py`). The cut is the score per cost of the first
one that the budget did not pay for; a *margin* is a score per cost relative to it: +0.5 is half as much again, −0.2 a
fifth below. What is left of the budget may still buy a cheaper triplet below the cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from adalora_scale.errors import UserError, nearest
from adalora_scale.report.run_files import Scored
from adalora_scale.report.score_lines import decode


@dataclass(frozen=True)
class Standing:
    """Of one matrix at one allocation. Margins are None where there is no cut, or no such triplet."""

    module: str
    size: int
    """Parameters of a triplet: in + out + 1."""
    cost: int
    """What one costs, in the budget's unit."""
    kept: list[float]
    """Scores S_k of its kept triplets, the best first."""
    dropped: list[float]
    """Scores of the others, the best first."""
    best: float | None
    """Margin of its best kept triplet."""
    worst: float | None
    """Margin of its worst kept triplet."""
    next: float | None
    """Margin of its best dropped triplet; 0 is the cut itself."""
    needs: int | None
    """How much larger a budget surely buys its best dropped triplet too, in the budget's unit, what is ranked before it
    included; None where nothing was dropped."""


@dataclass(frozen=True)
class Decision:
    """An allocation, matrix by matrix."""

    step: int
    budget: int
    spent: int
    unit: str
    score: str
    cut: float | None
    """Score per cost of the first triplet that was not paid for; None where all were."""
    gap: float | None
    """Relative distance from the last paid one to the cut."""
    of_each: int
    """What one triplet of every matrix costs: the price of raising target_r by one."""
    standings: dict[str, Standing]


def decision(scored: Scored, line: dict[str, Any] | None = None) -> Decision:
    """Return what an allocation decided.

    Args:
        scored: the run's scores.
        line: one of its lines; None for the last.

    Raises:
        UserError: the line is damaged, or there is none.
    """
    if line is None:
        if not scored.lines:
            raise UserError(f"{scored.source} holds no allocation.")
        line = scored.lines[-1]
    count = len(scored.modules)
    scores, kept = decode(line, count * scored.r, f"{scored.source}, step {line['step']},")
    sizes = np.array(list(scored.sizes.values()), dtype=np.int64)
    each = sizes if scored.unit == "params" else np.ones(count, dtype=np.int64)
    costs = each.repeat(scored.r)
    worth = scores / costs.astype(np.float32)
    order = np.argsort(-worth, kind="stable")
    sums = costs[order].cumsum()
    budget = int(line["budget"])
    paid = int((sums <= budget).sum())
    cut = float(worth[order[paid]]) if paid < len(order) else None
    price = np.empty(len(order), dtype=np.int64)
    price[order] = sums - budget
    standings = {}
    for index, name in enumerate(scored.modules):
        own = np.arange(index * scored.r, (index + 1) * scored.r)
        own = own[np.argsort(-worth[own], kind="stable")]
        mine, others = own[kept[own]], own[~kept[own]]
        ends = [worth[mine[0]] if len(mine) else None, worth[mine[-1]] if len(mine) else None]
        ends.append(worth[others[0]] if len(others) else None)
        best, worst, following = (_margin(end, cut) for end in ends)
        standings[name] = Standing(
            name, int(sizes[index]), int(each[index]), scores[mine].tolist(), scores[others].tolist(),
            best, worst, following, int(price[others[0]]) if len(others) else None,
        )  # fmt: skip
    gap = line.get("gap")
    spent = int(costs[kept].sum())
    gap = float(gap) if isinstance(gap, int | float) else None
    return Decision(line["step"], budget, spent, scored.unit, scored.score, cut, gap, int(each.sum()), standings)


def find_module(name: str, modules: list[str]) -> str:
    """Return the matrix that is meant by its name or the end or a part of it.

    Raises:
        UserError: none or several are.
    """
    tests = (str.__eq__, lambda module, word: module.endswith(f".{word}"), str.__contains__)
    for test in tests:
        found = [module for module in modules if test(module, name)]
        if len(found) == 1:
            return found[0]
        if found:
            listed = ", ".join(found[:4]) + (" …" if len(found) > 4 else "")
            raise UserError(f"--why {name} means {len(found)} matrices ({listed}); give more of the name.")
    raise UserError(f"--why {name}: no adapted matrix has that in its name.{nearest(name, modules)}")


def _margin(worth: Any, cut: float | None) -> float | None:
    return float(worth) / cut - 1 if worth is not None and cut is not None and cut > 0 else None
