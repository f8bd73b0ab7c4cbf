"""Weights of the base that PEFT saved beside an adapter on its embedding or head (`save_embedding_layers`).

PEFT writes `lm_head.base_layer.weight` as it was when training ended. The update stands on that weight, so it must be
the base's: where it is not (a vocabulary that was resized, a base that was trained on), the adapter is another base's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from adalora_scale.errors import UserError

BASE_LAYER = ".base_layer."


def require_own_copies(
    copies: Mapping[str, Callable[[], Tensor]], own: Callable[[str], Tensor | None], directory: Path | str
) -> None:
    """Compare every copy with the base's own weight, one at a time.

    Equal means equal in the dtype of either side: a run that loaded a float32 base in bfloat16 saved it rounded.

    Args:
        copies: parameter's name in the base → reads the copy.
        own: reads the base's parameter of a name; None where it has none of that name, or none in 16 or 32 bits.
        directory: the adapter's folder, for the message.

    Raises:
        UserError: one differs, or cannot be compared.
    """
    for name, read in copies.items():
        weight, copy = own(name), read()
        if weight is None:
            raise UserError(
                f"the adapter in {directory} holds a copy of the base's '{name}', which cannot be compared with this "
                f"base; pass the base it was trained on, or save the adapter with save_embedding_layers=False."
            )
        if weight.shape != copy.shape or not _equal(weight, copy):
            raise UserError(
                f"the adapter in {directory} holds a copy of '{name}' that differs from the base's "
                f"({_difference(weight, copy)}): it was trained on another base. Pass that base, or merge the adapter "
                f"with PEFT (merge_and_unload)."
            )


def _equal(weight: Tensor, copy: Tensor) -> bool:
    weight = weight.to(copy.device)
    return torch.equal(weight.to(copy.dtype), copy) or torch.equal(copy.to(weight.dtype), weight)


def _difference(weight: Tensor, copy: Tensor) -> str:
    if weight.shape != copy.shape:
        return f"shape {tuple(copy.shape)}, not {tuple(weight.shape)}"
    return f"by up to {(weight.to(copy.device).float() - copy.float()).abs().max().item():.2g}"
