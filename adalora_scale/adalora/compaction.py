"""Building adapters at the ranks that the final allocation left: parameters, moments and compute shrink.

After it the columns of pruned triplets are zero and stay zero, so leaving them out changes no value that is computed,
only the order in which zeros are not added. The matrices of a layer of experts have one width, that of the expert that
keeps most: each expert's kept triplets come first, and the columns after them are zero. A layer whose width would be
init_r stays as it is. So a mask of as many triplets as a layer has columns says which column is which, and of a mask of
more the kept triplets are the first columns of their matrix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.adalora.matrices import kept_columns, rows_of
from adalora_scale.errors import UserError


@torch.no_grad()
def compact(model: nn.Module, masks: Mapping[str, list[bool]]) -> None:
    """Keep only the triplets in `masks`, in place; a module that keeps none costs nothing any more.

    Args:
        model: a model that `inject_adalora` prepared, not yet wrapped, sharded or given to an optimizer.
        masks: name of an adapted module → which of its init_r triplets stay; of several matrices one after the other.

    Raises:
        UserError: the masks are of another model.
    """
    layers = dict(adapter_layers(model))
    for name, layer in layers.items():
        if name not in masks or len(masks[name]) != layer.matrices * layer.r:
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
        expected = width(layer.keep_mask, layer.matrices) if compacted and layer.keep_mask is not None else init_r
        if layer.r != expected:
            raise UserError(f"'{name}' has rank {layer.r} but adalora.init_r is {init_r}; inject with this config.")
    return compacted


def width(mask: Sequence[bool], matrices: int) -> int:
    """Return how many columns a module needs: the most triplets that one of its matrices keeps."""
    return max(map(sum, rows_of(mask, matrices)))


def columns(mask: Sequence[bool], matrices: int, r: int) -> list[list[int | None]] | None:
    """Return which triplet each of the r columns of each matrix is, None for one that is zero.

    Args:
        mask: which of a module's triplets are kept, matrix by matrix.
        matrices: how many the module stands for.
        r: columns that its factors have.

    Returns:
        A list of r a matrix; None where r is neither what the mask is of nor what it leaves.
    """
    rows = rows_of(mask, matrices)
    if matrices * r == len(mask):
        return [list(range(r)) for _ in rows]
    if r != width(mask, matrices):
        return None
    kept = [[k for k, bit in enumerate(row) if bit] for row in rows]
    return [[*own, *[None] * (r - len(own))] for own in kept]


def held_triplets(layer: AdaLoraLayer) -> list[bool]:
    """Return which of the triplets that a layer's factors have columns for are kept, matrix by matrix; all without a
    mask."""
    held = torch.zeros(layer.matrices, layer.r, dtype=torch.bool)
    for row, kept in zip(held, kept_columns(layer.matrices, layer.r, layer.keep_mask), strict=True):
        row[kept] = True
    return [bool(bit) for bit in held.flatten().tolist()]


def _keep(layer: AdaLoraLayer, mask: list[bool]) -> None:
    layer.keep_mask, before_r, n = list(mask), layer.r, layer.matrices
    layer.r = width(mask, n)
    if layer.r == before_r:
        return
    found = columns(mask, n, layer.r) or []
    places = torch.tensor([[k or 0 for k in own] for own in found], dtype=torch.long)  # (matrices, r)
    filled = torch.tensor([[k is not None for k in own] for own in found])
    for factor, shape in layer.shapes(layer.r).items():
        before: nn.Parameter = getattr(layer, factor)
        each = before.detach().view(n, -1, before_r)
        index = places.to(before.device).unsqueeze(1).expand(-1, each.shape[1], -1)
        values = (each.gather(-1, index) * filled.to(before.device).unsqueeze(1)).view(shape)
        delattr(layer, factor)
        if layer.r:
            setattr(layer, factor, nn.Parameter(values, requires_grad=before.requires_grad))
        else:  # engines and optimizers stumble over parameters without elements
            layer.register_buffer(factor, values, persistent=False)
