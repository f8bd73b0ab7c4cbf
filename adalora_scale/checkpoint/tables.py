"""The tables that say which file holds which interval of a tensor, checked before anything is read by them.

Intervals that overlap would hide a gap from a count of elements, and what lies in the gap is whatever was in memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from adalora_scale.checkpoint.errors import CheckpointError

Own = dict[str, list[tuple[int, int, int]]]
"""Tensor → (start, length, offset in the file's flat tensors) of one file's intervals."""
Places = dict[str, list[tuple[int, int, str, int]]]
"""Tensor → (start, length, file, offset in the file's flat tensors), by start."""
_ROWS_A_TENSOR = 64
"""More intervals of one tensor than one rank ever writes; a table becomes Python's integers, 30 times its size."""


def places(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    tables: Mapping[str, Tensor],
    flat: Mapping[str, Mapping[str, int]],
) -> Places:
    """Return where the intervals of a group's tensors are.

    Args:
        directory: the checkpoint, for messages.
        shapes: tensor → shape, in the order that the tables count in.
        tables: file → (n, 3) int64: index of the tensor, start, length.
        flat: file → name of a flat tensor of the group → its elements.

    Raises:
        CheckpointError: an interval lies outside its tensor, intervals overlap or leave a gap, or a flat tensor has
            other elements than its table says.
    """
    found: Places = {name: [] for name in shapes}
    for file, table in tables.items():
        for name, own in own_places(directory / file, shapes, table, flat[file]).items():
            found[name] += [(start, length, file, offset) for start, length, offset in own]
    for name, intervals in found.items():
        intervals.sort()
        _require_whole(directory, name, intervals, math.prod(shapes[name]))
    return found


def own_places(path: Path, shapes: Mapping[str, tuple[int, ...]], table: Tensor, flat: Mapping[str, int]) -> Own:
    """Return where one file holds intervals of a group's tensors, in the order of its table.

    Args:
        path: the file, for messages.
        shapes: tensor → shape, in the order that the table counts in.
        table: (n, 3) int64: index of the tensor, start, length.
        flat: name of a flat tensor of the group → its elements.

    Raises:
        CheckpointError: an interval lies outside its tensor, or a flat tensor has other elements than the table says.
    """
    found: Own = {}
    names, offset = list(shapes), 0
    if len(table) > _ROWS_A_TENSOR * max(len(names), 1):
        raise CheckpointError(f"{path} has {len(table):,} intervals of {len(names)} tensors; take another.")
    for index, start, length in table.tolist():
        whole = math.prod(shapes[names[index]]) if 0 <= index < len(names) else -1
        if start < 0 or length < 0 or start + length > whole:
            raise CheckpointError(
                f"{path} has an interval ({index}, {start}, {length}) that is none of its tensors'; take another "
                f"checkpoint."
            )
        if length:
            found.setdefault(names[index], []).append((start, length, offset))
        offset += length
    wrong = next((name for name, elements in flat.items() if elements != offset), None)
    if wrong is not None:
        raise CheckpointError(f"{path} has {flat[wrong]:,} elements in '{wrong}', its table {offset:,}; take another.")
    return found


def _require_whole(directory: Path, name: str, intervals: list[tuple[int, int, str, int]], elements: int) -> None:
    end = 0
    for start, length, file, _ in intervals:
        if start != end:
            what = "twice" if start < end else "not at all"
            raise CheckpointError(
                f"the checkpoint {directory} holds element {min(start, end)} of '{name}' {what} ({file}); its files do "
                f"not belong together."
            )
        end = start + length
    if end != elements:
        raise CheckpointError(
            f"the checkpoint {directory} holds {end} of {elements} elements of '{name}'; its files do not belong "
            f"together."
        )
