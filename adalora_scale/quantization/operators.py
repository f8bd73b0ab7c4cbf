"""The product with a 4-bit weight; under `torch.compile` an operator of torch's own, so that a compiler sees one node.

The backward is an operator too. Written out, its dequantisation would be the same expression as the forward's, and a
compiler that merges equal expressions would keep the 16-bit weight from the forward to the backward; as it is, only the
bytes are saved, and the weight lives during each product only.

    adalora_scale::matmul_4bit             y = x Wᵀ + b
    adalora_scale::matmul_4bit_backward    ∂L/∂x = ∂L/∂y · W

Without a compiler the same two functions run under an autograd function: an operator defined in Python costs some 50
microseconds more each way, a third of what a matrix of 64 × 64 takes.

Importing this module does not import bitsandbytes; the first call does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adalora_scale.quantization import functional
from adalora_scale.quantization.spec import QuantSpec


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
    product = _operator if _as_operator(x) else _Eager.apply
    y: Tensor = product(x, packed, scales, nested, bias, blocksize, quant_type, shape)
    return y


def gradient_4bit(gradient: Tensor, *matrix: Any) -> Tensor:
    """Return ∂L/∂x of `matmul_4bit`, (..., in_features), of ∂L/∂y, (..., out_features), in its dtype.

    Args:
        gradient: ∂L/∂y.
        matrix: packed, scales, nested, blocksize, quant_type and shape, as `matmul_4bit` takes them.
    """
    product = _backward_operator if _as_operator(gradient) else _gradient
    of_x: Tensor = product(gradient, *matrix)
    return of_x


def _as_operator(x: Tensor) -> bool:
    """Whether a tensor has no bytes to compute on, or speaks operators only (fake, meta, distributed)."""
    return torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta


def _product(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor,
    bias: Tensor | None,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> Tensor:
    spec = QuantSpec(blocksize=blocksize, quant_type=quant_type)
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x, packed, scales, nested, spec, (shape[0], shape[1]), bias)


def _gradient(
    gradient: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> Tensor:
    spec = QuantSpec(blocksize=blocksize, quant_type=quant_type)
    with torch.autocast(gradient.device.type, enabled=False):
        weight = functional.dequantize(packed, scales, nested, spec, (shape[0], shape[1]), gradient.dtype)
        return gradient @ weight


_operator = torch.library.custom_op("adalora_scale::matmul_4bit", _product, mutates_args=())
_backward_operator = torch.library.custom_op("adalora_scale::matmul_4bit_backward", _gradient, mutates_args=())


@_operator.register_fake
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


@_backward_operator.register_fake
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
    return _backward_operator(gradient, *ctx.saved_tensors, *ctx.options), *[None] * 7


_operator.register_autograd(_differentiate, setup_context=_save)


class _Eager(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        y = _product(*inputs)
        _save(ctx, inputs, y)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return _gradient(gradient, *ctx.saved_tensors, *ctx.options), *[None] * 7
