"""Giving parameters on the meta device memory, without losing their ties or the buffers that are real already."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

Places = list[tuple[nn.Module, str]]
"""Modules and attributes that share one parameter."""


def materialize(modules: Iterable[nn.Module], device: torch.device, ties: list[Places]) -> None:
    """Allocate what is on the meta device in `modules` themselves (not in their children), and move the rest.

    Args:
        modules: whose own parameters and buffers are meant.
        device: where they go.
        ties: parameters that several modules share; a partner that has memory already is used.
    """
    partners = {(id(module), leaf): places for places in ties for module, leaf in places}
    for module in modules:
        for leaf, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            twin = _materialized(partners.get((id(module), leaf), []))
            if twin is not None:
                module._parameters[leaf] = twin
            elif parameter.is_meta:
                module._parameters[leaf] = nn.Parameter(
                    torch.empty_like(parameter, device=device), requires_grad=parameter.requires_grad
                )
            else:
                parameter.data = parameter.data.to(device)
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = torch.empty_like(buffer, device=device) if buffer.is_meta else buffer.to(device)


def materialize_shards(model: nn.Module, storage: torch.device, device: torch.device, ties: list[Places]) -> None:
    """Allocate the shards of a model that `fully_shard` sharded on the meta device.

    Args:
        model: the sharded model.
        storage: where shards are kept (the CPU under CPU offload).
        device: where the model computes, and its buffers are.
        ties: parameters that several modules share.
    """
    real = {
        (id(module), leaf): buffer
        for module in model.modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    }
    model.to_empty(device=storage)
    for module in model.modules():
        for leaf, buffer in list(module._buffers.items()):
            if (kept := real.get((id(module), leaf))) is not None:
                module._buffers[leaf] = kept.to(device)
            elif buffer is not None:
                module._buffers[leaf] = buffer.to(device)
    for (first, name), *others in ties:
        for module, leaf in others:  # to_empty gave each a tensor of its own
            module._parameters[leaf] = first._parameters[name]


def _materialized(places: Places) -> nn.Parameter | None:
    for module, leaf in places:
        parameter = module._parameters[leaf]
        if parameter is not None and not parameter.is_meta:
            return parameter
    return None
