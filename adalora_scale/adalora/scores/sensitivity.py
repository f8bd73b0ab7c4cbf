"""Sensitivity alone: the paper's ablation of its uncertainty.

    I = |w · ∂L/∂w|                           Ī ← β₁ Ī + (1 − β₁) I           (eq. 8, 9)
    S_k = Ī(λ_k) + mean over rows of Ī(A_·k) + mean over rows of Ī(B_·k)

Source: arXiv 2303.10512, section 4.4, "s = Ī".
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from adalora_scale.adalora.score import Score, ScoredPiece, unscaled_products


class Sensitivity(Score):
    """Ī of every weight of a triplet."""

    statistics: ClassVar[tuple[str, ...]] = ("sensitivity",)

    def observe(
        self, pieces: list[ScoredPiece], weights: list[Tensor], gradients: list[Tensor], grad_scale: Tensor | float
    ) -> None:
        """Update Ī in place; arguments as `Score.observe`."""
        self.follow(pieces, weights, gradients, grad_scale)

    def follow(
        self, pieces: list[ScoredPiece], weights: list[Tensor], gradients: list[Tensor], grad_scale: Tensor | float
    ) -> list[Tensor]:
        """Update Ī in place and return this step's I, (length,) of every piece; arguments as `Score.observe`."""
        mean = [piece.statistics["sensitivity"] for piece in pieces]
        current = unscaled_products(weights, gradients, grad_scale)
        torch._foreach_abs_(current)
        torch._foreach_mul_(mean, self.config.beta1)
        torch._foreach_add_(mean, current, alpha=1 - self.config.beta1)
        return current

    def contributions(self, pieces: list[ScoredPiece], weights: list[Tensor]) -> list[Tensor]:
        """Return Ī / rows: λ's own, and a mean over the rows of A and of B."""
        return [piece.statistics["sensitivity"] / piece.rows for piece in pieces]


SCORE = Sensitivity
