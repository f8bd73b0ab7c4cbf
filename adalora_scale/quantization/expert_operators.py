"""The product of each expert's rows with its 4-bit matrix, as operators of torch's own (`operators` says why).

    adalora_scale::matmul_experts_4bit             y_i = W_e x_i
    adalora_scale::matmul_experts_4bit_backward    ∂L/∂x_i = W_eᵀ ∂L/∂y_i

Both read the ends of the groups once, and dequantise the experts that have rows one after the other, so that one
expert's 16-bit weight is there at a time however many experts there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from adalora_scale.quantization import functional
from adalora_scale.quantization.spec import QuantSpec


def expert_weight(
    expert: int,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    spec: QuantSpec,
    shape: tuple[int, int],
    dtype: torch.dtype,
) -> Tensor:
    """Return one expert's (out_features, in_features) matrix in `dtype`; tensors as of `ExpertLinear4bit`."""
    blocks = shape[0] * shape[1] // spec.blocksize
    span = slice(expert * blocks, (expert + 1) * blocks)
    level = None if nested is None else nested[expert]
    absmax = functional.decode_expert_scales(scales[span], level)
    return functional.dequantize_blocks(packed[span], absmax, spec, dtype).view(shape)


@torch.library.custom_op("adalora_scale::matmul_experts_4bit", mutates_args=())
def matmul_experts_4bit(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    ends: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> Tensor:
    """Return (S, out_features): row i of x times its expert's Wᵀ, in x's dtype, whatever autocast says.

    Args:
        x: (S, in_features) float32, bfloat16 or float16, rows by expert.
        packed, scales, nested: as of `ExpertLinear4bit`.
        ends: (experts,) int32, as of `Groups`.
        blocksize, quant_type: of the matrices.
        shape: (out_features, in_features) of one.
    """
    return _by_expert(x, packed, scales, nested, ends, blocksize, quant_type, shape, transposed=True)


@torch.library.custom_op("adalora_scale::matmul_experts_4bit_backward", mutates_args=())
def matmul_experts_4bit_backward(
    gradient: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    ends: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> Tensor:
    """Return ∂L/∂x, (S, in_features), of ∂L/∂y, (S, out_features), in its dtype."""
    return _by_expert(gradient, packed, scales, nested, ends, blocksize, quant_type, shape, transposed=False)


def _by_expert(
    rows: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    ends: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
    *,
    transposed: bool,
) -> Tensor:
    spec = QuantSpec(blocksize=blocksize, quant_type=quant_type)
    sides = (shape[0], shape[1])
    result = rows.new_empty(rows.shape[0], sides[0] if transposed else sides[1])
    start = 0
    with torch.autocast(rows.device.type, enabled=False):
        for expert, end in enumerate(ends.tolist()):
            if end > start:
                weight = expert_weight(expert, packed, scales, nested, spec, sides, rows.dtype)
                result[start:end] = rows[start:end] @ (weight.T if transposed else weight)
                del weight
            start = end
    return result


@matmul_experts_4bit.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    ends: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> Tensor:
    return x.new_empty(x.shape[0], shape[0])


@matmul_experts_4bit_backward.register_fake
def _(
    gradient: Tensor,
    packed: Tensor,
    scales: Tensor,
    nested: Tensor | None,
    ends: Tensor,
    blocksize: int,
    quant_type: str,
    shape: Sequence[int],
) -> Tensor:
    return gradient.new_empty(gradient.shape[0], shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, packed, scales, nested, ends, *ctx.options = inputs
    ctx.save_for_backward(packed, scales, nested, ends)  # the bytes: engines gather them again for the backward


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return matmul_experts_4bit_backward(gradient, *ctx.saved_tensors, *ctx.options), *[None] * 7


matmul_experts_4bit.register_autograd(_differentiate, setup_context=_save)
