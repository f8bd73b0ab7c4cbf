"""nn.Linear: the weight is the matrix, (out_features, in_features)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalora_scale.adalora.adaptables.base import Adaptable, Base
from adalora_scale.adalora.adapted_product import Product, autocast_dtype
from adalora_scale.errors import Unsupported
from adalora_scale.quantization.called import computes_linear


class Matrix(Adaptable[Base]):
    """What all linear layers share: ``((dropout(x) A) ⊙ E) Bᵀ``."""

    linear = True

    def add_update(
        self,
        base: Base,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        e: Tensor,
        b: Tensor,
        dropout: Callable[[Tensor], Tensor],
        *more: Any,
    ) -> Tensor:  # x: (..., rows of A), y: (..., rows of B)
        inner = (dropout(x).reshape(-1, a.shape[0]) @ a) * e
        if y.dtype != b.dtype or autocast_dtype(y) is not None:  # autocast would round y as well
            return y + F.linear(inner, b).to(y.dtype).view(y.shape)
        # The product adds onto y: no tensor of y's size for the update alone, and no rounding of it.
        return torch.addmm(y.reshape(-1, b.shape[0]), inner, b.T).view(y.shape)


def require_linear(base: nn.Module) -> None:
    """See that the layer is called as a linear one.

    Raises:
        Unsupported: its forward computes something else.
    """
    if not computes_linear(base):
        raise Unsupported(
            f"cannot adapt a {type(base).__module__}.{type(base).__name__}: its forward is not a linear layer's own. "
            f"Exclude it with adalora.exclude_modules."
        )


class LinearProduct(Product):
    """``x Wᵀ + bias``."""

    kind: ClassVar[type[nn.Module]] = nn.Linear

    def dtype(self, base: nn.Module, frozen: Sequence[Tensor]) -> torch.dtype:
        return frozen[0].dtype

    def frozen(self, base: nn.Module) -> tuple[Tensor, ...]:
        return (cast(Tensor, base.weight),)

    def multiply(self, base: nn.Module, x: Tensor, frozen: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        return F.linear(x, frozen[0], bias)

    def multiply_back(self, base: nn.Module, gradient: Tensor, frozen: Sequence[Tensor]) -> Tensor:
        return gradient @ frozen[0]


class Linear(Matrix[nn.Linear]):
    """torch's linear layer."""

    types = (nn.Linear,)
    product = LinearProduct()

    def sides(self, base: nn.Linear) -> tuple[int, int]:
        require_linear(base)
        return base.in_features, base.out_features
