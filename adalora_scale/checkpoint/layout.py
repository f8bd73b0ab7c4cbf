"""Which ranks' files hold which elements of a tensor, in three numbers a tensor whatever the number of ranks.

Engines cut a tensor into consecutive pieces of one length, the first of which may be shorter (a flat partition begins
inside it) and the last one too, and consecutive ranks hold them. A *run* says so: (rank of the first piece, its
elements, elements of each further piece). With it a reader opens the files that hold what it needs; without it, all of
them, which at 512 ranks are 262,000 openings. A run is only where to look: a file's own table says what it holds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from adalora_scale.engines.ranks import agreed, collective_device, rank_and_size

Run = tuple[int, int, int]
"""(rank of the first piece, its elements, elements of each further piece)."""
Runs = dict[str, dict[str, Run]]
"""group → tensor → run; tensors that are cut otherwise are not there."""
Totals = dict[str, dict[str, int]]
"""group → tensor → elements that the ranks have together."""


def runs_of(
    shapes: Mapping[str, Mapping[str, Sequence[int]]], own: Mapping[str, Sequence[tuple[str, int, int]]]
) -> tuple[Runs, Totals]:
    """Return how all ranks hold the tensors; a collective call of 56 bytes a tensor, for any number of ranks.

    Args:
        shapes: group → name → whole shape; the same on every rank, in the same order.
        own: group → (name, start, length) of this rank's pieces.
    """
    keys = [(group, name) for group, names in shapes.items() for name in names]
    pieces: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for group, intervals in own.items():
        for name, start, length in intervals:
            if length:
                pieces.setdefault((group, name), []).append((start, length))
    rank, size = rank_and_size()
    begun, odd, total = [], [], []
    for key in keys:
        held = pieces.get(key, [])
        first = [length for start, length in held if start == 0]
        begun.append((rank + 1 if first else 0, max(first, default=0), max((n for s, n in held if s), default=0)))
        total.append(sum(length for _, length in held))
    found = _over_ranks(begun, size, dist.ReduceOp.MAX)
    for key, row in zip(keys, found, strict=True):
        run, whole, held = (row[0] - 1, row[1], row[2]), math.prod(shapes[key[0]][key[1]]), pieces.get(key, [])
        odd.append(int(held != ([] if (piece := piece_of(run, rank, whole)) is None else [piece])))
    written = _over_ranks([[count] for count in total], size, dist.ReduceOp.SUM)
    otherwise = _over_ranks([[flag] for flag in odd], size, dist.ReduceOp.MAX)
    runs: Runs = {group: {} for group in shapes}
    totals: Totals = {group: {} for group in shapes}
    for (group, name), row, count, flag in zip(keys, found, written, otherwise, strict=True):
        totals[group][name] = count[0]
        if not flag[0] and row[0]:
            runs[group][name] = (row[0] - 1, row[1], row[2])
    return runs, totals


def piece_of(run: Run, rank: int, whole: int) -> tuple[int, int] | None:
    """Return (start, length) of a rank's piece of a tensor of `whole` elements, or None."""
    first, head, step = run
    number = rank - first
    if first < 0 or number < 0:
        return None
    start = 0 if number == 0 else head + (number - 1) * step
    length = min(head if number == 0 else step, whole - start)
    return (start, length) if length > 0 else None


def ranks_with(run: Run, start: int, length: int, world_size: int) -> range:
    """Return the ranks whose pieces hold elements [start, start + length) of a tensor."""
    first, head, step = run
    if length <= 0:
        return range(0)

    def holder(element: int) -> int:
        further = 0 if element < head else 1 + (element - head) // step if step else world_size
        return min(first + further, world_size)

    return range(holder(start), min(holder(start + length - 1) + 1, world_size))


def usual_alone(scalars: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return an optimizer's numbers with the usual ones once, under the empty name; a collective call.

    Where ranks have other usual ones all of them are returned by name.

    Args:
        scalars: name of a parameter → its numbers, of this rank's.
    """
    every = list(scalars.values())
    seen = {repr(sorted(numbers.items())): numbers for numbers in every}
    counts: dict[str, int] = {}
    for numbers in every:
        key = repr(sorted(numbers.items()))
        counts[key] = counts.get(key, 0) + 1
    usual = max(counts, key=lambda key: counts[key]) if counts else None
    if not agreed(None if usual is None else hashlib.sha256(usual.encode()).digest()) or usual is None:
        return {name: dict(numbers) for name, numbers in scalars.items()}
    rest = {name: dict(numbers) for name, numbers in scalars.items() if numbers != seen[usual]}
    return {"": dict(seen[usual])} | rest


def _over_ranks(rows: Sequence[Sequence[int]], size: int, how: dist.ReduceOp.RedOpType) -> list[list[int]]:
    """Reduce rows of integers over all ranks."""
    if size == 1 or not rows:
        return [list(row) for row in rows]
    table = torch.tensor(rows, dtype=torch.int64, device=collective_device())
    dist.all_reduce(table, op=how)
    found: list[list[int]] = table.tolist()
    return found
