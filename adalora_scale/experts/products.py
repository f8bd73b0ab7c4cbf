"""One product for all experts: each group of rows with its own matrix.

`grouped_mm` of torch where it runs, as one kernel; a product for each expert that a row reached where it does not
(float64), which is also what the fast path is tested against.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adalora_scale.experts.groups import Groups

_FAST = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16
"""Bytes that the strides of `grouped_mm`'s operands must be a multiple of."""


def grouped_product(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Return (S, out): row i of x times the matrix of row i's expert.

    Args:
        x: (S, in), rows by expert.
        weight: (experts, in, out) in the dtype of `x`; any strides.
        groups: which rows are whose.
    """
    if groups.loop or x.dtype not in _FAST or not x.shape[0]:  # grouped_mm refuses an empty operand
        return looped_product(x, weight, groups)
    result: Tensor = _Grouped.apply(x, weight, groups.ends)
    return result


def looped_product(x: Tensor, weight: Tensor, groups: Groups) -> Tensor:
    """Do what `grouped_product` does, expert by expert, in plain operations: the reference."""
    ends = groups.ends.tolist()
    pieces = [x[start:end] @ weight[n] for n, (start, end) in enumerate(zip([0, *ends], ends, strict=False))]
    return torch.cat(pieces)


class _Grouped(torch.autograd.Function):
    """`grouped_mm` on operands whose sides and strides it takes, forwards and backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, ends)
        return _rows_by_matrices(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, ends = ctx.saved_tensors
        (dy,) = gradients
        dx = _rows_by_matrices(dy, weight.mT, ends) if ctx.needs_input_grad[0] else None
        dw = None
        if ctx.needs_input_grad[1]:
            left, right = _aligned(x, 1), _aligned(dy, 1)
            dw = F.grouped_mm(left.mT, right, offs=ends)[:, : x.shape[1], : dy.shape[1]]
        return dx, dw, None


def _rows_by_matrices(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    # The side that is summed over may be padded by zeros on both operands; the other one is cut off again.
    if weight.stride(-1) == 1:
        inner = -(-weight.shape[1] // _multiple(x)) * _multiple(x)
        padded = F.pad(_aligned(weight, 2), (0, 0, 0, inner - weight.shape[1]))
    else:  # a transposed view: pad where it is contiguous
        outer = -(-weight.shape[2] // _multiple(x)) * _multiple(x)
        padded = F.pad(_aligned(weight.mT, 2), (0, 0, 0, outer - weight.shape[2])).mT
    return F.grouped_mm(_aligned(x, 1), padded, offs=ends)[:, : weight.shape[2]]


def _aligned(tensor: Tensor, side: int) -> Tensor:
    """Return the tensor contiguous, its last side padded by zeros until rows begin at aligned addresses."""
    surplus = -tensor.shape[side] % _multiple(tensor)
    return F.pad(tensor, (0, surplus)) if surplus else tensor.contiguous()


def _multiple(tensor: Tensor) -> int:
    return _ALIGNMENT // tensor.element_size()
