"""Weights that a model holds under several names (a head tied to its embedding), where an adapter holds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adalora_scale.adalora.injection import injected_module, plain_name


def part_what_differs(model: nn.Module, others: Mapping[str, Tensor], *, keeps_ties: bool) -> None:
    """Give modules that share a weight one each, in place, where an adapter means them to have different ones.

    PEFT trains a copy of every module in modules_to_save: an adapter of its own may hold a head and an embedding that
    were tied and are no longer, or one of the two, over which the other keeps the base's weight.

    Args:
        model: the base model.
        others: tensors of modules that were trained in full, by their names in the model.
        keeps_ties: whether a shared weight that the adapter holds under one name stays shared.
    """
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    for group in groups.values():
        held = [name for name in group if name in others]
        if len(group) < 2 or not held:
            continue
        for name in group:
            same = torch.equal(others[name], others[held[0]]) if name in held else keeps_ties
            if not same:
                _part(model, name)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """Return name → further names of every trained parameter that an injected model holds under several."""
    groups: dict[int, list[str]] = {}
    for name, parameter in (injected_module(model) or model).named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            groups.setdefault(id(parameter), []).append(plain_name(name))
    return {first: others for first, *others in groups.values() if others}


def _part(model: nn.Module, name: str) -> None:
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    shared = module.get_parameter(leaf)
    setattr(module, leaf, nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad))
    shape: Any = getattr(model, "config", None)
    if shape is not None and getattr(shape, "tie_word_embeddings", False):
        shape.tie_word_embeddings = False
