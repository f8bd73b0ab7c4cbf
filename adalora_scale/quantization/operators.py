"""The product with a 4-bit weight as an operator of torch's own, so that `torch.compile` sees one node for it.

The backward is an operator too. Written out, its dequantisation would be the same expression as the forward's, and a
compiler that merges equal expressions would keep the 16-bit weight from the forward to the backward; as it is, only the
bytes are saved, and the weight lives during each product only.

    adalora_scale::matmul_4bit             y = x Wᵀ + b
    adalora_scale::matmul_4bit_backward    ∂L/∂x = ∂L/∂y · W

Importing this module does not import bitsandbytes; the first call does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adalora_scale.quantization import functional
from adalora_scale.quantization.spec import QuantSpec


@torch.library.custom_op("adalora_scale::matmul_4bit", mutates_args=())
def matmul_4bit(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor,
    bias: Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> Tensor:
    """Return ``x Wᵀ + bias`` in x's dtype, whatever autocast says: compute_dtype is the user's word.

    Args:
        x: (..., in_features) float32, bfloat16 or float16.
        packed, scales, nested: the matrix, as in `functional`.
        bias: (out_features,) in x's dtype.
        blocksize, quant_type: of the matrix.
        shape: (out_features, in_features).
    """
    spec = QuantSpec(blocksize=blocksize, quant_type=quant_type)
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x, packed, scales, nested, spec, (shape[0], shape[1]), bias)


@torch.library.custom_op("adalora_scale::matmul_4bit_backward", mutates_args=())
def matmul_4bit_backward(
    gradient: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> Tensor:
    """Return ∂L/∂x, (..., in_features), of ∂L/∂y, (..., out_features), in its dtype."""
    spec = QuantSpec(blocksize=blocksize, quant_type=quant_type)
    with torch.autocast(gradient.device.type, enabled=False):
        weight = functional.dequantize(packed, scales, nested, spec, (shape[0], shape[1]), gradient.dtype)
        return gradient @ weight


@matmul_4bit.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor,
    bias: Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> Tensor:
    return x.new_empty(*x.shape[:-1], shape[0])


@matmul_4bit_backward.register_fake
def _(
    gradient: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> Tensor:
    return gradient.new_empty(*gradient.shape[:-1], shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scales, nested, _, *ctx.options = inputs
    ctx.save_for_backward(packed, scales, nested)  # the bytes: engines gather them again for the backward


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return matmul_4bit_backward(gradient, *ctx.saved_tensors, *ctx.options), *[None] * 7


matmul_4bit.register_autograd(_differentiate, setup_context=_save)
