"""A linear layer whose weight is kept in 4 bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adalora_scale.adalora.adaptables.linear import Matrix
from adalora_scale.adalora.adapted_product import Product
from adalora_scale.quantization.linear import Linear4bit
from adalora_scale.quantization.operators import gradient_4bit, matmul_4bit


class Product4bit(Product):
    """``x Wᵀ + bias`` with the weight in 4 bits, dequantised in both directions."""

    kind = Linear4bit

    def dtype(self, base: Linear4bit, frozen: Sequence[Tensor]) -> torch.dtype:
        return base.spec.compute_dtype

    def frozen(self, base: Linear4bit) -> tuple[Tensor, ...]:
        return base.weight, base.scales, base.nested

    def multiply(self, base: Linear4bit, x: Tensor, frozen: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        weight, scales, nested = frozen
        shape = (base.out_features, base.in_features)
        return matmul_4bit(x, weight, scales, nested, bias, base.spec.blocksize, base.spec.quant_type, shape)

    def multiply_back(self, base: Linear4bit, gradient: Tensor, frozen: Sequence[Tensor]) -> Tensor:
        weight, scales, nested = frozen
        shape = (base.out_features, base.in_features)
        return gradient_4bit(gradient, weight, scales, nested, base.spec.blocksize, base.spec.quant_type, shape)


class QuantisedLinear(Matrix[Linear4bit]):
    """The stored bytes are of (out, in); the checkpoint they were made from may have held (in, out)."""

    types = (Linear4bit,)
    product = Product4bit()

    def sides(self, base: Linear4bit) -> tuple[int, int]:
        return base.in_features, base.out_features

    def is_transposed(self, base: Linear4bit) -> bool:
        return base.transposed
