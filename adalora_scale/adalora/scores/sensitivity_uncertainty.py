"""Sensitivity times uncertainty, from the task's gradient and the weight that it is the gradient of.

    I = |w · ∂L/∂w|                           Ī ← β₁ Ī + (1 − β₁) I           (eq. 8, 9)
    Ū ← β₂ Ū + (1 − β₂) |I − Ī|               s = Ī · Ū                       (eq. 10, 11)
    S_k = s(λ_k) + mean over rows of s(A_·k) + mean over rows of s(B_·k)      (eq. 12)

Source: arXiv 2303.10512.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_scale.adalora.score import ScoredPiece
from adalora_scale.adalora.scores.sensitivity import Sensitivity


class SensitivityUncertainty(Sensitivity):
    """Ī · Ū of every weight of a triplet: large where a weight matters to the loss and is not settled yet."""

    statistics = ("sensitivity", "uncertainty")

    def observe(
        self, pieces: list[ScoredPiece], weights: list[Tensor], gradients: list[Tensor], grad_scale: Tensor | float
    ) -> None:
        """Update Ī and Ū in place; arguments as `Score.observe`."""
        current = self.follow(pieces, weights, gradients, grad_scale)
        torch._foreach_sub_(current, [piece.statistics["sensitivity"] for piece in pieces])
        torch._foreach_abs_(current)
        uncertainty = [piece.statistics["uncertainty"] for piece in pieces]
        torch._foreach_mul_(uncertainty, self.config.beta2)
        torch._foreach_add_(uncertainty, current, alpha=1 - self.config.beta2)

    def contributions(self, pieces: list[ScoredPiece], weights: list[Tensor]) -> list[Tensor]:
        """Return Ī · Ū / rows: λ's own, and a mean over the rows of A and of B."""
        products = torch._foreach_mul(
            [piece.statistics["sensitivity"] for piece in pieces],
            [piece.statistics["uncertainty"] for piece in pieces],
        )
        return [product / piece.rows for product, piece in zip(products, pieces, strict=True)]


SCORE = SensitivityUncertainty
