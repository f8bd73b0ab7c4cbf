"""Keeping a process small while it loads: work in pieces, and give back what was freed."""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Iterator

PIECE = 2 * 2**20
"""Weights that are read, and quantised, at a time: a matrix of a large model would need several times its own size."""
CPU_PIECE = 2**18
"""The same where the CPU quantises: bitsandbytes' kernel there takes some 20 bytes a weight besides."""


def row_pieces(start: int, stop: int, row: int, piece: int) -> Iterator[tuple[int, int]]:
    """Cut rows start to stop, of `row` elements each, into ranges of about `piece` elements."""
    step = max(1, piece // max(1, row))
    for first in range(start, stop, step):
        yield first, min(stop, first + step)


def block_pieces(start: int, stop: int, blocksize: int, row: int, piece: int) -> Iterator[tuple[int, int]]:
    """Cut blocks start to stop of a row-major matrix into ranges of about `piece` weights.

    Cuts are at the beginning of rows of `row` weights, so that no row is read twice.
    """
    unit = math.lcm(blocksize, row) // blocksize
    step = max(1, piece // (unit * blocksize)) * unit
    while start < stop:
        last = min(stop, (start // step + 1) * step)
        yield start, last
        start = last


def give_back_freed() -> None:
    """Return freed memory to the system.

    glibc keeps freed pieces of up to 32 MiB for later requests, and hands it back only from the end of its heap: a
    third of a loaded shard was seen on top of it.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library
        return None
