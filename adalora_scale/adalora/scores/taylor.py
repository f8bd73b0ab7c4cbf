"""The squared first-order Taylor term of λ: how much the loss would change if the triplet were removed.

    L(λ_k = 0) − L ≈ −λ_k · ∂L/∂λ_k           S_k ← β₁ S_k + (1 − β₁) (λ_k · ∂L/∂λ_k)²

Removing a triplet is setting its λ to zero, so λ alone is looked at, and one number a triplet is kept. `beta2` is not
used.

Source: Molchanov et al. 2019, arXiv 1906.10771, the first-order criterion, with the mean over batches as an EMA.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_scale.adalora.score import Score, ScoredPiece, unscaled_products


class Taylor(Score):
    """EMA of (λ · ∂L/∂λ)², from the task's gradient and the weight that it is the gradient of."""

    statistics = ("taylor",)
    factors = ("lora_E",)

    def observe(
        self, pieces: list[ScoredPiece], weights: list[Tensor], gradients: list[Tensor], grad_scale: Tensor | float
    ) -> None:
        """Update the EMA in place; arguments as `Score.observe`."""
        mean = [piece.statistics["taylor"] for piece in pieces]
        terms = unscaled_products(weights, gradients, grad_scale)
        torch._foreach_mul_(mean, self.config.beta1)
        torch._foreach_addcmul_(mean, terms, terms, value=1 - self.config.beta1)

    def contributions(self, pieces: list[ScoredPiece], weights: list[Tensor]) -> list[Tensor]:
        """Return the EMA itself: λ is one element a triplet."""
        return [piece.statistics["taylor"] for piece in pieces]


SCORE = Taylor
