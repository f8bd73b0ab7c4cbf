"""Which triplets keep their place: exactly `budget` of them, ties broken by position."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Allocation:
    """What one allocation decided."""

    step: int
    budget: int
    ranks: dict[str, int]
    """Kept triplets of every module."""
    gap: float
    """Relative distance between the worst kept and the best dropped score (0 is a tie)."""


def keep_best(scores: Tensor, budget: int) -> Tensor:
    """Return the mask of the `budget` highest scores.

    Args:
        scores: (triplets,), one score a triplet, ordered by (layer, k).
        budget: how many to keep, 0 ≤ budget ≤ triplets.

    Returns:
        (triplets,) bool with exactly `budget` True; of equal scores the one with the smaller index stays, so every
        rank with the same scores finds the same mask.

    Source: arXiv 2303.10512 eq. 7; PEFT's threshold (`<= kthvalue`) drops all of a tie instead.
    """
    order = torch.sort(scores, descending=True, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[:budget]] = True
    return mask


def relative_gap(scores: Tensor, budget: int) -> float:
    """Return (last kept − first dropped) / last kept: how far the cut is from a tie; 1.0 where nothing is dropped."""
    if not 0 < budget < scores.numel():
        return 1.0
    ordered = torch.sort(scores, descending=True, stable=True).values
    kept, dropped = ordered[budget - 1].item(), ordered[budget].item()
    return (kept - dropped) / kept if kept > 0 else 0.0


def mask_digest(mask: Tensor) -> str:
    """Return 16 hex digits that differ between different masks (for comparison over ranks and runs)."""
    return hashlib.sha256(bytes(mask.cpu().to(torch.uint8).tolist())).hexdigest()[:16]
