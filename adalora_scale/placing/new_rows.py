"""Rows that an embedding and its head have behind those of the checkpoint, for a base that streams from its files."""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_scale.quantization.plan import LoadingPlan, Slot
from adalora_scale.tasks.vocabulary import added_rows


def draw_rows(plan: LoadingPlan, grown: dict[str, int], *, seed: int) -> None:
    """Draw the rows that tensors have behind the checkpoint's, as `grow_in_memory` does; every rank draws all."""
    for slot in plan.slots:
        if (old := grown.get(slot.name)) is not None:
            tensor: Tensor = getattr(slot.module, slot.leaf)

            def read(start: int, stop: int, slot: Slot = slot, dtype: torch.dtype = tensor.dtype) -> Tensor:
                return plan.checkpoint.rows(slot.source, start, stop).to(dtype)

            plan.added[slot.name] = added_rows(read, old, tensor.shape[0] - old, seed=seed)
