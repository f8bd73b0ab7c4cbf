"""The orthogonality penalty, without autograd.

    R = weight / (2n) · Σ_F ‖FᵀF − I‖_F          over the 2n factors F (A and B of n layers), as in PEFT
    ∂R/∂F = F M_F,   M_F = weight / n · (FᵀF − I) / ‖FᵀF − I‖_F

Only the r × r Gram matrices are needed beside F itself, so ranks that hold rows of F add up their Grams and then
multiply their own rows (`controller/step_sums.py`).

Source: arXiv 2303.10512 eq. 4 (sum of squared norms); peft AdaLoraModel.forward (mean of unsquared norms, kept here so
that `orth_reg_weight` means what PEFT's key means).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def penalty(grams: Tensor, weight: float, keep: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (R, M): the penalty and the matrices that turn each factor into its gradient.

    Args:
        grams: (2n, r, r), FᵀF of every factor of the model.
        weight: orth_reg_weight.
        keep: (2n, r) bool; columns outside it count neither as present nor as missing.

    Returns:
        R as a scalar tensor, M as (2n, r, r) with ∂R/∂F = F M.
    """
    r = grams.shape[-1]
    deviation = grams - torch.eye(r, dtype=grams.dtype, device=grams.device)
    if keep is not None:
        deviation = deviation * (keep.unsqueeze(1) & keep.unsqueeze(2))
    norm = torch.linalg.matrix_norm(deviation)  # (2n,)
    value = weight * norm.sum() / max(len(grams), 1)
    # The norm is not differentiable at 0; there the penalty is minimal and its gradient 0.
    inverse = torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))
    multiplier = deviation * (inverse * (2 * weight / max(len(grams), 1))).view(-1, 1, 1)
    return value, multiplier


def gradient_norm(grams: Tensor, multiplier: Tensor) -> Tensor:
    """Return ‖∂R/∂F‖ over all factors as a scalar, from the Grams alone: ‖F M‖² = tr(M G M)."""
    return (multiplier * torch.bmm(grams, multiplier)).sum().clamp_min(0).sqrt()
