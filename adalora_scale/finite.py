"""Numbers that are none: NaN and infinities in tensors, found without a temporary as large as the tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from adalora_scale.errors import UserError


def is_finite(tensor: Tensor) -> bool:
    """Return whether every value is a number; true of dtypes that hold nothing else, and of nothing."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if tensor.element_size() == 1:  # float8 has no minimum
        return bool(tensor.float().isfinite().all())
    low, high = tensor.aminmax()  # a NaN comes out of both
    return math.isfinite(low) and math.isfinite(high)


def require_finite(tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors with values that are not finite.

    Args:
        tensors: by the names that a message gives.
        where: what they are of, such as "the adapter".

    Raises:
        UserError: one has; it is named.
    """
    for name, tensor in tensors.items():
        if not is_finite(tensor):
            raise UserError(f"'{name}' of {where} has values that are not finite (NaN or infinity).")
