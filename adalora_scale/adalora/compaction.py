"""Building adapters at the ranks that the final allocation left: parameters, moments and compute shrink.

After it the columns of pruned triplets are zero and stay zero, so leaving them out changes no value that is computed,
only the order in which zeros are not added.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from adalora_scale.adalora.adaptables import FACTORS
from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.errors import UserError


@torch.no_grad()
def compact(model: nn.Module, masks: Mapping[str, list[bool]]) -> None:
    """Keep only the triplets in `masks`, in place; a module that keeps none costs nothing any more.

    Args:
        model: a model that `inject_adalora` prepared, not yet wrapped, sharded or given to an optimizer.
        masks: name of an adapted module → which of its init_r triplets stay.

    Raises:
        UserError: the masks are of another model.
    """
    layers = dict(adapter_layers(model))
    for name, layer in layers.items():
        if name not in masks or len(masks[name]) != layer.r:
            raise UserError(f"the masks are of another model: they don't fit '{name}' of rank {layer.r}.")
    for name, layer in layers.items():
        _keep(layer, masks[name])


def is_compact(layers: Mapping[str, AdaLoraLayer], init_r: int) -> bool:
    """Return whether adapters were built at their pruned ranks rather than at `init_r`.

    Raises:
        UserError: a layer has neither rank.
    """
    compacted = any(layer.r != init_r for layer in layers.values())
    for name, layer in layers.items():
        expected = sum(layer.keep_mask) if compacted and layer.keep_mask is not None else init_r
        if layer.r != expected:
            raise UserError(f"'{name}' has rank {layer.r} but adalora.init_r is {init_r}; inject with this config.")
    return compacted


def _keep(layer: AdaLoraLayer, mask: list[bool]) -> None:
    kept = torch.tensor([k for k, bit in enumerate(mask) if bit], dtype=torch.long)
    layer.keep_mask = list(mask)
    layer.r = len(kept)
    for factor in FACTORS:
        before: nn.Parameter = getattr(layer, factor)
        values = before.detach().index_select(-1, kept.to(before.device))
        delattr(layer, factor)
        if layer.r:
            setattr(layer, factor, nn.Parameter(values, requires_grad=before.requires_grad))
        else:  # engines and optimizers stumble over parameters without elements
            layer.register_buffer(factor, values, persistent=False)
