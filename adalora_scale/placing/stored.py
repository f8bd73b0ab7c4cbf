"""Weights of a base that is still on the meta device, read whole from its files."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from adalora_scale.export.tensor_files import FLOATING, TensorFile
from adalora_scale.placing.streaming import Loading


def stored_weights(loading: Loading) -> Callable[[str], Tensor | None]:
    """Return what reads a weight of the base by its name; call it before injection.

    What it returns gives None for a weight that the files do not have under that name, or have in 4 bits.
    """
    names = {id(module): name for name, module in loading.model.named_modules()}
    slots = {f"{names[id(slot.module)]}.{slot.leaf}": slot for slot in loading.plan.slots if id(slot.module) in names}
    checkpoint = loading.plan.checkpoint

    def read(name: str) -> Tensor | None:
        slot = slots.get(name)
        if slot is None or slot.parts:
            return None
        stored = checkpoint.stored(slot.source)
        if stored.dtype not in FLOATING:
            return None
        fused = slot.source in checkpoint.fused
        return checkpoint.whole(slot.source) if fused else TensorFile(stored.file).tensor(slot.source)

    return read
