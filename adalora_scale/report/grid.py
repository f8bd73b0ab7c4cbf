"""Where a matrix stands in a model, read off its name: stack, layer, type; experts of one layer share a place."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

_LAYER = re.compile(r"^(?P<before>.*?)\.(?P<index>\d+)\.(?P<type>.+)$")
_INNER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Place:
    """Of a matrix: `model.layers.3.mlp.experts.5.up_proj` is type `mlp.experts.*.up_proj` of layer 3."""

    stack: str
    """What stands before the layer's index (`model.layers`); empty where there is none."""
    layer: int | None
    type: str
    """What stands behind it; further indices are a star. The whole name where there is no layer."""


@dataclass
class Stack:
    """Layers under one name, as a grid."""

    name: str
    layers: list[int] = field(default_factory=list)
    types: list[str] = field(default_factory=list)
    cells: dict[tuple[int, str], list[str]] = field(default_factory=dict)
    """(layer, type) → the matrices there; several are experts."""

    @property
    def heads(self) -> list[str]:
        """The types' last words, or the whole types where two have the same."""
        return short(self.types)

    @property
    def has_experts(self) -> bool:
        """Whether a cell holds several matrices."""
        return any(len(names) > 1 for names in self.cells.values())


def place_of(module: str) -> Place:
    """Return where a matrix of that name stands."""
    match = _LAYER.match(module)
    if match is None:
        return Place("", None, module)
    return Place(match["before"], int(match["index"]), _INNER.sub("*", match["type"]))


def grids(modules: Iterable[str]) -> tuple[list[Stack], list[str]]:
    """Return the stacks of a model in the order of their first matrices, and the matrices that belong to no layer."""
    stacks: dict[str, Stack] = {}
    others = []
    for module in modules:
        place = place_of(module)
        if place.layer is None:
            others.append(module)
            continue
        stack = stacks.setdefault(place.stack, Stack(place.stack))
        if place.layer not in stack.layers:
            stack.layers.append(place.layer)
        if place.type not in stack.types:
            stack.types.append(place.type)
        stack.cells.setdefault((place.layer, place.type), []).append(module)
    return list(stacks.values()), others


def groups(modules: Iterable[str]) -> dict[str, list[str]]:
    """Return a model's matrices by type, under names as short as they can be told apart by."""
    found: dict[Place, list[str]] = {}
    for module in modules:
        place = place_of(module)
        found.setdefault(Place(place.stack, None, place.type), []).append(module)
    names = short([place.type for place in found])
    if len(set(names)) < len(names):
        names = [f"{place.stack}: {place.type}" if place.stack else place.type for place in found]
    return dict(zip(names, found.values(), strict=True))


def short(types: list[str]) -> list[str]:
    """Return the last words of dotted names; the whole names where two of them end alike."""
    last = [name.rpartition(".")[2] for name in types]
    return last if len(set(last)) == len(last) else list(types)
