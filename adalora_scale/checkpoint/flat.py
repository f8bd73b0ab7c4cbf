"""What one rank's file of pieces holds: flat tensors, and the table of the intervals that stand in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

TABLE = "intervals"


@dataclass
class Group:
    """This rank's intervals of a group of tensors, with one value a kind for each interval."""

    intervals: list[tuple[str, int, int]] = field(default_factory=list)
    """(name of the tensor, start, length)."""
    values: dict[str, list[Tensor]] = field(default_factory=dict)
    """kind → (length,) tensors, one an interval."""


def joined(key: str, values: Sequence[Tensor]) -> Tensor:
    """Return the values of one kind as one flat tensor on the CPU, a copy."""
    flat = [value.detach().reshape(-1).cpu() for value in values]
    return torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float32)


def flat_tensors(
    groups: Mapping[str, Group],
    names: Mapping[str, Sequence[str]],
    extras: Mapping[str, Tensor],
    join: Callable[[str, Sequence[Tensor]], Tensor] = joined,
) -> dict[str, Tensor]:
    """Return copies of what one rank's file holds: name in the file → tensor on the CPU.

    Args:
        groups: group → this rank's intervals and values.
        names: group → the names of its tensors, the same list on every rank.
        extras: further small tensors of this rank, such as the states of its random number generators.
        join: what makes one flat copy, (elements,) on the CPU, of the values of a name in the file.
    """
    tensors = {f"extra.{key}": value.detach().cpu().contiguous().clone() for key, value in extras.items()}
    for name, group in groups.items():
        index = {tensor: number for number, tensor in enumerate(names[name])}
        rows = [(index[tensor], start, length) for tensor, start, length in group.intervals]
        tensors[f"{name}.{TABLE}"] = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        for kind, values in group.values.items():
            tensors[f"{name}.{kind}"] = join(f"{name}.{kind}", values)
    return tensors
