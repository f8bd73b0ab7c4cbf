"""What the dtype of a merged model makes of W + ΔW, put into the live model: so that a comparison can leave it out.

A merged bfloat16 model differs from its adapter by the rounding of its weights, which can be as large as the adapter's
own effect. Only the rounding is added here, at most half a unit in the last place of a weight, and the live adapter
stays as it is: what is wrong with a merged model cannot hide in it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.base_checkpoint import BaseCheckpoint

_WIDE = (torch.float32, torch.float64)


@torch.no_grad()
def add_rounding(model: nn.Module, adapter: AdapterFile, base: BaseCheckpoint) -> bool:
    """Add to the weights under an adapter what rounding W + ΔW to the dtype of the base's files adds, in place.

    Args:
        model: float32, with the adapter on it, as this package or PEFT puts it there.
        adapter: the same adapter.
        base: the files; their dtype is the merged model's.

    Returns:
        Whether anything was rounded; not where the base is in float32.
    """
    inner = getattr(getattr(model, "base_model", None), "model", model) if hasattr(model, "peft_config") else model
    rounded = False
    for module in adapter.modules:
        dtype = base.stored_dtype(f"{module}.weight")
        if dtype is None or dtype in _WIDE:
            continue
        layer: nn.Module = inner.get_submodule(module).base_layer  # type: ignore[assignment]
        weight: Tensor = layer.weight  # type: ignore[assignment]
        rows = weight.shape[0]
        total = weight + adapter.update(module).delta(0, rows, transposed=base.transposed(module)).view_as(weight)
        # A parameter of its own: what the weight is tied to is not adapted.
        layer.weight = nn.Parameter(weight + (total.to(dtype).to(weight.dtype) - total), requires_grad=False)
        rounded = True
    for name in adapter.others:
        dtype = base.stored_dtype(name) or torch.float32
        if dtype not in _WIDE:
            parameter = _trained_in_full(inner, name)
            parameter.copy_(parameter.to(dtype))
            rounded = True
    return rounded


def _trained_in_full(model: nn.Module, name: str) -> Tensor:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    copies = getattr(module, "modules_to_save", None)  # PEFT's wrapper
    return getattr(next(iter(copies.values())) if copies is not None else module, leaf)
