"""Which triplets keep their place: those of the highest scores that the budget pays for, ties broken by position."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Allocation:
    """What one allocation decided."""

    step: int
    budget: int
    """What was to be spent, in `adalora.budget_unit`."""
    ranks: dict[str, int]
    """Kept triplets of every matrix."""
    gap: float
    """Relative distance between the worst kept and the best dropped score (0 is a tie)."""
    scores: Tensor | None = field(default=None, repr=False, compare=False)
    """(triplets,) float32 on the CPU, ordered by (matrix, k): what was decided on; None where it was restored."""


def keep_best(scores: Tensor, budget: int, costs: Tensor | None = None) -> Tensor:
    """Return the mask of the triplets that the budget is spent on.

    Triplets are taken in the order of score per cost until one does not fit; what is left goes, in the same order, to
    those that still fit. Where each costs one these are the `budget` highest scores.

    Args:
        scores: (triplets,), one score a triplet, ordered by (matrix, k).
        budget: how much may be spent: a number of triplets, or a sum of their costs.
        costs: (triplets,) positive integers, what each costs; None: one each.

    Returns:
        (triplets,) bool. Never more than the budget is spent, and less than any triplet left out costs remains. Of
        equal scores the one with the smaller index stays, so every rank with the same scores finds the same mask.

    All on the CPU.

    Source: arXiv 2303.10512 eq. 7; PEFT's threshold (`<= kthvalue`) drops all of a tie instead. With costs: the greedy
        rule of the 0-1 knapsack problem (Dantzig 1957).
    """
    costs = _or_ones(costs, scores)
    return spend(_by_worth(scores, costs)[1], budget, costs)


def spend(order: Tensor, budget: int, costs: Tensor) -> Tensor:
    """Return the mask of what is bought when things are asked for in an order.

    They are taken until one does not fit; what is left goes, in the same order, to those that still fit.

    Args:
        order: (n,) indices, the best first.
        budget: how much may be spent.
        costs: (n,) positive integers, what each costs.

    Returns:
        (n,) bool. All on the CPU.
    """
    # In NumPy: each turn of the loop reads numbers, which torch dispatches one by one.
    places = order.numpy()
    in_order = costs.numpy()[places]
    mask = np.zeros(len(places), dtype=bool)
    first_out, left = _prefix(in_order, budget)
    mask[places[:first_out]] = True
    while first_out < len(places):
        fits = in_order[first_out:] <= left
        if not fits.any():
            break
        place = first_out + int(fits.argmax())
        mask[places[place]] = True
        left -= int(in_order[place])
        first_out = place + 1
    return torch.from_numpy(mask)


def relative_gap(scores: Tensor, budget: int, costs: Tensor | None = None) -> float:
    """Return (last kept − first dropped) / last kept: how far the cut is from a tie; 1.0 where nothing is dropped.

    Of the scores per cost, and before what is left goes to those that still fit. Arguments as `keep_best`.
    """
    costs = _or_ones(costs, scores)
    worth, order = _by_worth(scores, costs)
    first_out, _ = _prefix(costs.numpy()[order.numpy()], budget)
    if not 0 < first_out < scores.numel():
        return 1.0
    kept, dropped = worth.numpy()[first_out - 1 : first_out + 1].tolist()
    return float((kept - dropped) / kept) if kept > 0 else 0.0


def _or_ones(costs: Tensor | None, scores: Tensor) -> Tensor:
    return torch.ones(scores.numel(), dtype=torch.int64) if costs is None else costs


def _by_worth(scores: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
    """Return scores per cost, the highest first, and whose they are."""
    values, order = torch.sort(scores / costs, descending=True, stable=True)
    return values, order


def _prefix(in_order: np.ndarray, budget: int) -> tuple[int, int]:
    """Return how many are taken before the first that does not fit, and what is left then."""
    sums = in_order.cumsum()
    taken = int((sums <= budget).sum())
    return taken, budget - (int(sums[taken - 1]) if taken else 0)


def mask_digest(mask: Tensor) -> str:
    """Return 16 hex digits that differ between different masks (for comparison over ranks and runs)."""
    return hashlib.sha256(bytes(mask.cpu().to(torch.uint8).tolist())).hexdigest()[:16]
