"""What a score is: what it remembers of every adapter weight, when it looks, and what a triplet is worth.

A score works on flat pieces of adapter tensors in multi-tensor operations, so it does not know who holds the rest, nor
how many tensors of one shape are in a piece (`controller/arena.py` puts them next to each other). The
score of triplet k is the sum of the contributions of column k's elements, over all factors and ranks:

    S_k = Σ over factors Σ over rows of contribution(row, k)

which the controller adds up; a mean over rows is a contribution divided by the number of rows. Every score is one file
in `adalora/scores/`, whose name is the value of `adalora.score`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from adalora_scale.adalora.layer import FACTORS
from adalora_scale.config import AdaLoraConfig


@dataclass(frozen=True)
class ScoredPiece:
    """Contiguous row-major pieces of adapter tensors (rows, r) of one shape, with what the score remembers of them."""

    factor: str
    """`lora_A`, `lora_E` or `lora_B`."""
    rows: int
    """Rows of each whole tensor; 1 for `lora_E`."""
    statistics: dict[str, Tensor] = field(default_factory=dict)
    """The score's statistics by name, each (length,) float32; checkpoints hold them under these names."""


class Score(ABC):
    """How important a triplet is; subclasses say so by class attributes and two methods.

    Args:
        config: the method's options.

    Source: arXiv 2303.10512, section 3.2.
    """

    statistics: ClassVar[tuple[str, ...]]
    """Names of the statistics: one float32 a weight each, zero at the start, kept until the final allocation."""
    factors: ClassVar[tuple[str, ...]] = FACTORS
    """Factors that the score looks at; no memory is spent on the others."""
    sees_penalty: ClassVar[bool] = False
    """Whether the gradient it observes has the orthogonality penalty's in it, or is the task's alone."""
    after_update: ClassVar[bool] = False
    """Whether the weight it observes is the one after the optimizer's update, or the one that the gradient is of."""
    observes_final_step: ClassVar[bool] = True
    """Whether the step of the final allocation is observed before it allocates."""
    keeps_columns: ClassVar[bool] = False
    """Whether pruned triplets keep their columns after the final allocation, in the penalty too; else whole triplets
    become zero and can be left out of the model."""

    def __init__(self, config: AdaLoraConfig) -> None:
        self.config = config

    @abstractmethod
    def observe(
        self, pieces: list[ScoredPiece], weights: list[Tensor], gradients: list[Tensor], grad_scale: Tensor | float
    ) -> None:
        """Update the statistics in place, once an optimizer step for every piece.

        Args:
            pieces: pieces of the score's factors; at least one.
            weights: (length,) float32, one a piece; only to be read.
            gradients: the same of ∂L/∂w, a copy that may be overwritten.
            grad_scale: factor the gradients still carry (a GradScaler's), to be divided out.
        """

    @abstractmethod
    def contributions(self, pieces: list[ScoredPiece], weights: list[Tensor]) -> list[Tensor]:
        """Return (length,) of every piece: what each element adds to the score of its triplet.

        Args:
            pieces: as in `observe`, all of this rank.
            weights: (length,) float32 of now, one a piece.
        """


def unscaled_products(weights: list[Tensor], gradients: list[Tensor], grad_scale: Tensor | float) -> list[Tensor]:
    """Return w · ∂L/∂w of every piece, in place of the gradients, without the factor that they carry."""
    products = gradients
    torch._foreach_mul_(products, weights)
    if not (isinstance(grad_scale, float) and grad_scale == 1.0):
        # After the product: |w · g| of a scaled gradient is farther from float32's smallest number.
        torch._foreach_div_(products, grad_scale)
    return products
