"""One product for all experts: each group of rows with its own matrix.

`grouped_mm` of torch where it runs, as one kernel; a product for each expert where it does not (float64) or is not
wanted. An operator of torch's own, forward and backward, so that `torch.compile` sees one node for it: torch traces
`grouped_mm` in bfloat16 alone.

    adalora_scale::grouped_product     y_i = x_i W_e for row i of expert e; with Wᵀ also ∂L/∂x
    adalora_scale::grouped_outer       ∂L/∂W_e = Σ x_i ∂L/∂y_iᵀ over the rows i of expert e
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from adalora_scale.experts.groups import Groups

_FAST = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16
"""Bytes that the strides of `grouped_mm`'s operands must be a multiple of."""


def grouped_product(x: Tensor, weight: Tensor, groups: Groups, *, turned: bool = False) -> Tensor:
    """Return (S, out): row i of x times the matrix of row i's expert.

    Args:
        x: (S, in), rows by expert.
        weight: (experts, in, out) in the dtype of `x`; any strides. It is kept for the backward as it is given: a
            parameter, which an engine may put away meanwhile, and no view that would hold its values.
        groups: which rows are whose.
        turned: the weight is (experts, out, in).
    """
    return _product(x, weight, groups.ends, groups.loop, turned)


@torch.library.custom_op("adalora_scale::grouped_product", mutates_args=())
def _product(x: Tensor, weight: Tensor, ends: Tensor, loop: bool, turned: bool) -> Tensor:
    """Return (S, out) for x (S, in), weight (experts, in, out), or turned, and ends (experts,) int32."""
    weight = weight.mT if turned else weight
    with torch.autocast(x.device.type, enabled=False):
        if _is_fast(x, loop):
            return _rows_by_matrices(x, weight, ends)
        y = x.new_empty(x.shape[0], weight.shape[2])
        for number, rows in enumerate(_slices(ends)):
            torch.mm(x[rows], weight[number], out=y[rows])
        return y


@torch.library.custom_op("adalora_scale::grouped_outer", mutates_args=())
def _outer(x: Tensor, dy: Tensor, ends: Tensor, loop: bool) -> Tensor:
    """Return (experts, in, out) for x (S, in) and dy (S, out); zeros for an expert without a row."""
    with torch.autocast(x.device.type, enabled=False):
        if _is_fast(x, loop):
            product = F.grouped_mm(_aligned(x, 1).mT, _aligned(dy, 1), offs=ends)
            return product[:, : x.shape[1], : dy.shape[1]].contiguous()
        dw = x.new_empty(ends.shape[0], x.shape[1], dy.shape[1])
        for number, rows in enumerate(_slices(ends)):
            torch.mm(x[rows].mT, dy[rows], out=dw[number])
        return dw


@_product.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor, loop: bool, turned: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if turned else 2])


@_outer.register_fake
def _(x: Tensor, dy: Tensor, ends: Tensor, loop: bool) -> Tensor:
    return x.new_empty(ends.shape[0], x.shape[1], dy.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ends, ctx.loop, ctx.turned = inputs
    # What no gradient needs is not kept: a frozen weight's input, a first layer's factor.
    wants_dx, wants_dw, *_ = ctx.needs_input_grad
    ctx.save_for_backward(x if wants_dw else None, weight if wants_dx else None, ends)


def _differentiate(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
    x, weight, ends = ctx.saved_tensors
    dx = None if weight is None else _product(dy, weight, ends, ctx.loop, not ctx.turned)
    dw = None
    if x is not None:
        dw = _outer(dy, x, ends, ctx.loop) if ctx.turned else _outer(x, dy, ends, ctx.loop)
    return dx, dw, None, None, None


_product.register_autograd(_differentiate, setup_context=_save)


def _is_fast(x: Tensor, loop: bool) -> bool:
    if loop or x.dtype not in _FAST or not x.shape[0]:  # grouped_mm refuses an empty operand
        return False
    return x.device.type != "cuda" or torch.cuda.get_device_capability(x.device) >= (8, 0)


def _slices(ends: Tensor) -> list[slice]:
    places = [0, *ends.tolist()]
    return [slice(start, end) for start, end in itertools.pairwise(places)]


def _rows_by_matrices(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    # The side that is summed over may be padded by zeros on both operands; the other one is cut off again.
    turned = weight.stride(-1) != 1  # a transposed view: pad where it is contiguous
    padded = _padded(_aligned(weight.mT if turned else weight, 2), 1)
    padded = padded.mT if turned else padded
    return F.grouped_mm(_aligned(x, 1), padded, offs=ends)[:, : weight.shape[2]].contiguous()


def _aligned(tensor: Tensor, side: int) -> Tensor:
    """Return the tensor contiguous, its last side padded by zeros until rows begin at aligned addresses."""
    return _padded(tensor, side).contiguous()


def _padded(tensor: Tensor, side: int) -> Tensor:
    surplus = -tensor.shape[side] % _multiple(tensor)
    below = tensor.dim() - 1 - side
    return F.pad(tensor, [0, 0] * below + [0, surplus]) if surplus else tensor  # F.pad copies where it adds nothing


def _multiple(tensor: Tensor) -> int:
    return _ALIGNMENT // tensor.element_size()
