"""One tensor of a merged model, before it is written, and the sum that most of them are."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from adalora_scale.errors import UserError
from adalora_scale.export.tensor_files import DTYPES
from adalora_scale.finite import is_finite, require_finite


@dataclass(frozen=True)
class Planned:
    """One tensor of the result."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    """Bytes."""
    pieces: Callable[[], Iterable[bytes | Tensor]]
    """Makes its bytes, a piece at a time."""


def added(weight: Tensor, delta: Tensor, dtype: str, module: str) -> Tensor:
    """Return weight + delta, summed in at least float32, in the named dtype.

    Raises:
        UserError: the weight is not finite, or the sum does not fit the dtype.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    total = (wide + delta).to(DTYPES[dtype])
    if not is_finite(total):
        require_finite({module: weight}, "the base model")  # looked at only where something is wrong
        raise UserError(f"the merged weight of '{module}' does not fit {DTYPES[dtype]}; merge into a wider base.")
    return total
