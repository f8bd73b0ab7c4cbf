"""How spans fall into rows: a flat ZeRO piece may begin or end inside a row of an (n, r) factor.

A row that several ranks hold pieces of is a *split row* and has a slot in one small buffer that is summed over ranks;
every other row is whole on one rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_scale.engines.span import Extent


class FactorRows:
    """Whole and split rows of this rank's spans of the factors.

    Args:
        own: (start, length) of this rank's span of every factor.
        extents: the same for every rank that holds different pieces, this one included; equal on all of them.
        r: columns of every factor.
        device: where the factors are.
    """

    def __init__(self, own: list[Extent], extents: list[list[Extent]], r: int, device: torch.device) -> None:
        self._r = r
        slots: dict[tuple[int, int], int] = {}  # (factor, row) -> slot
        for factor in range(len(own)):
            for extent in sorted({rank[factor] for rank in extents}):
                for row in _split_rows(extent, r):
                    slots.setdefault((factor, row), len(slots))
        self.slots = len(slots)
        self.factor_of_slot = torch.tensor([factor for factor, _ in slots], dtype=torch.long, device=device)
        self._whole: list[tuple[int, int]] = []  # (offset in the span, rows)
        self._pieces: list[tuple[int, int, int, int, int]] = []  # (factor, offset, length, slot, first column)
        for factor, (start, length) in enumerate(own):
            head = min(-start % r, length)
            rows = (length - head) // r
            tail = length - head - rows * r
            self._whole.append((head, rows))
            if head:
                self._pieces.append((factor, 0, head, slots[factor, start // r], start % r))
            if tail:
                offset = head + rows * r
                self._pieces.append((factor, offset, tail, slots[factor, (start + offset) // r], 0))

    def whole(self, pieces: list[Tensor], factors: list[int] | None = None) -> list[Tensor]:
        """Return the whole rows of each (length,) piece as a (rows, r) view.

        Args:
            pieces: one piece a factor.
            factors: which factors they are; None means all, in order.
        """
        r = self._r
        places = self._whole if factors is None else [self._whole[factor] for factor in factors]
        return [
            piece[offset : offset + rows * r].view(rows, r)
            for piece, (offset, rows) in zip(pieces, places, strict=True)
        ]

    def write_split(self, out: Tensor, pieces: list[Tensor]) -> None:
        """Copy this rank's elements of split rows to their places in `out` (slots, r)."""
        if self._pieces:
            torch._foreach_copy_(
                [out[slot, column : column + length] for _, _, length, slot, column in self._pieces],
                [pieces[factor][offset : offset + length] for factor, offset, length, _, _ in self._pieces],
            )

    def add_split(self, pieces: dict[int, Tensor], rows: Tensor) -> None:
        """Add this rank's elements of `rows` (slots, r) to the pieces of the factors in `pieces`."""
        mine = [piece for piece in self._pieces if piece[0] in pieces]
        if not mine:
            return
        targets = [pieces[factor][offset : offset + length] for factor, offset, length, _, _ in mine]
        values = [rows[slot, column : column + length] for _, _, length, slot, column in mine]
        torch._foreach_add_(targets, values)


def _split_rows(extent: Extent, r: int) -> list[int]:
    start, length = extent
    if length == 0:
        return []
    end = start + length
    return sorted({edge // r for edge in (start, end) if edge % r})
