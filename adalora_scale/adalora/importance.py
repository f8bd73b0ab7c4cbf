"""Sensitivity and uncertainty of every adapter weight, and the score of a triplet.

    I = |w · ∂L/∂w|                           Ī ← β₁ Ī + (1 − β₁) I           (eq. 8, 9)
    Ū ← β₂ Ū + (1 − β₂) |I − Ī|               s = Ī · Ū                       (eq. 10, 11)
    S_k = s(λ_k) + mean over rows of s(A_·k) + mean over rows of s(B_·k)      (eq. 12)

Source: arXiv 2303.10512. All functions work on flat pieces of adapter tensors, so they do not know who holds the rest.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def update_importance(
    sensitivity: list[Tensor],
    uncertainty: list[Tensor],
    weights: list[Tensor],
    gradients: list[Tensor],
    *,
    beta1: float,
    beta2: float,
    grad_scale: Tensor | float = 1.0,
) -> None:
    """Update Ī and Ū in place, in multi-tensor operations.

    Args:
        sensitivity, uncertainty, weights, gradients: equally long lists of equally shaped float32 tensors.
        beta1, beta2: EMA coefficients.
        grad_scale: factor the gradients still carry (a GradScaler's), divided out.
    """
    if not weights:
        return
    current = torch._foreach_mul(weights, gradients)
    torch._foreach_abs_(current)
    if not (isinstance(grad_scale, float) and grad_scale == 1.0):
        torch._foreach_div_(current, grad_scale)
    torch._foreach_mul_(sensitivity, beta1)
    torch._foreach_add_(sensitivity, current, alpha=1 - beta1)
    torch._foreach_sub_(current, sensitivity)
    torch._foreach_abs_(current)
    torch._foreach_mul_(uncertainty, beta2)
    torch._foreach_add_(uncertainty, current, alpha=1 - beta2)


@torch.no_grad()
def add_column_sums(out: Tensor, values: Tensor, *, start: int) -> None:
    """Add to `out` (r,) the column sums of a contiguous row-major piece of an (n, r) tensor.

    Args:
        out: (r,), one sum a triplet.
        values: (length,), the piece; may be empty and may begin or end inside a row.
        start: index of the piece's first element in the whole tensor.
    """
    r = out.numel()
    head = min(-start % r, values.numel())
    if head:
        first = start % r
        out[first : first + head] += values[:head]
    rows = (values.numel() - head) // r
    if rows:
        out += values[head : head + rows * r].view(rows, r).sum(0)
    tail = values[head + rows * r :]
    out[: tail.numel()] += tail
