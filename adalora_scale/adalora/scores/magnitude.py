"""The magnitude of λ: the paper's ablation of its importance, S_k = |λ_k|. No gradient is looked at.

Source: arXiv 2303.10512, section 4.4, "S_i = |λ_i|".
"""

from __future__ import annotations

from torch import Tensor

from adalora_scale.adalora.score import Score, ScoredPiece


class Magnitude(Score):
    """|λ| of now."""

    statistics = ()
    factors = ("lora_E",)

    def observe(
        self, pieces: list[ScoredPiece], weights: list[Tensor], gradients: list[Tensor], grad_scale: Tensor | float
    ) -> None:
        """Remember nothing; arguments as `Score.observe`."""

    def contributions(self, pieces: list[ScoredPiece], weights: list[Tensor]) -> list[Tensor]:
        """Return |λ|: one element a triplet."""
        return [weight.abs() for weight in weights]


SCORE = Magnitude
