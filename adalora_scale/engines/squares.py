"""Sums of squared gradients, in one pass over many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def squares_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return (len(tensors),) float32 sums of squares; a NaN or infinity in a tensor makes its sum non-finite."""
    if not tensors:
        return torch.zeros(0, dtype=torch.float32)
    return torch.stack(torch._foreach_norm(list(tensors), dtype=torch.float32)).square()
