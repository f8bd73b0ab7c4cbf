"""nn.Linear: the weight is the matrix, (out_features, in_features)."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from adalora_scale.adalora.adaptables.base import Adaptable, Base


class Matrix(Adaptable[Base]):
    """What all linear layers share: ``((dropout(x) A) ⊙ E) Bᵀ``."""

    linear = True

    def update(
        self, base: Base, x: Tensor, a: Tensor, e: Tensor, b: Tensor, dropout: Callable[[Tensor], Tensor]
    ) -> Tensor:  # x: (..., rows of A) -> (..., rows of B)
        return F.linear((dropout(x) @ a) * e, b)


class Linear(Matrix[nn.Linear]):
    """torch's linear layer."""

    types = (nn.Linear,)

    def sides(self, base: nn.Linear) -> tuple[int, int]:
        return base.in_features, base.out_features
