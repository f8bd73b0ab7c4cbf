"""Rows that several ranks hold pieces of: a flat ZeRO piece may begin or end inside a row of an (n, r) factor.

Such a row is a *split row* and has a slot in one small buffer that is summed over ranks; every other row is whole on
one rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from adalora_scale.controller.arena import RowPiece
from adalora_scale.engines.span import AdapterTensor
from adalora_scale.errors import Unsupported

_PART = 16 * 2**20
"""Bytes of the split rows that are multiplied at a time."""


class SplitRows:
    """The split rows of the factors of one rank, and this rank's elements of them.

    Factors are numbered tensor by tensor, and in a tensor of several matrices matrix by matrix.

    Args:
        cuts: of every tensor, the (n,) int64 positions inside it at which one rank's piece ends and another's begins,
            on the CPU; equal on all ranks.
        tensors: what they are of.
        own: this rank's pieces of rows that it does not hold whole, with the number of each one's tensor.
        r: columns of every factor.
        device: where the arena is.

    Raises:
        Unsupported: a piece of this rank ends where there is no cut.
    """

    def __init__(
        self,
        cuts: Sequence[Tensor],
        tensors: Sequence[AdapterTensor],
        own: Sequence[tuple[int, RowPiece]],
        r: int,
        device: torch.device,
    ) -> None:
        self._r = r
        rows = [torch.unique(positions[positions % r != 0] // r) for positions in cuts]
        counts = [len(found) for found in rows]
        firsts = [0, *torch.tensor(counts, dtype=torch.long, device="cpu").cumsum(0).tolist()]
        self.slots: int = firsts[-1]
        begins = [0, *accumulate(tensor.matrices for tensor in tensors)]
        elements: list[int] = []
        places: list[tuple[int, int, int]] = []
        own_slots: list[int] = []
        own_factors: list[int] = []
        for number, piece in own:
            place = int(torch.searchsorted(rows[number], piece.row))
            if place == counts[number] or int(rows[number][place]) != piece.row:
                raise Unsupported(
                    f"a rank's piece of an adapter ends inside row {piece.row}, where by its shape and the number of "
                    f"ranks none does: an option of the engine moves pieces where adalora_scale does not look."
                )
            slot = firsts[number] + place
            columns = range(piece.column, piece.column + piece.length)
            elements += range(piece.position, piece.position + piece.length)
            places += [(slot, len(own_slots), column) for column in columns]
            own_slots.append(slot)
            own_factors.append(begins[number] + piece.row // tensors[number].rows)

        def index(values: Sequence[int]) -> Tensor:
            return torch.tensor(values, dtype=torch.long, device=device)

        self.elements = index(elements)
        """Positions of this rank's elements in the arena."""
        self._in_slots = index([slot * r + column for slot, _, column in places])
        self._in_own = index([piece * r + column for _, piece, column in places])
        self._own_slots, self._own_factors = index(own_slots), index(own_factors)
        of_slots = [begins[n] + found // tensors[n].rows for n, found in enumerate(rows)]
        split, in_each = torch.cat([torch.zeros(0, dtype=torch.long, device="cpu"), *of_slots]).unique(
            return_counts=True
        )
        tiles, factors = _tiles(split.tolist(), in_each.tolist(), r)
        # Places beyond a factor's last row read some row, which is made zero: a copy with a row of zeros at its end
        # would be as large as what all ranks sum.
        self._tiles = tiles.clamp(max=max(self.slots - 1, 0)).to(device)
        self._padding = (tiles == self.slots).unsqueeze(1).to(device)
        self._factor_of_tile = factors.to(device)

    def write(self, out: Tensor, weights: Tensor) -> None:
        """Copy this rank's elements from the arena's flat `weights` to their places in `out` (slots, r)."""
        if self.elements.numel():
            out.view(-1).index_copy_(0, self._in_slots, weights.index_select(0, self.elements))

    def add_gram(self, grams: Tensor, split: Tensor) -> None:
        """Add FᵀF of the split rows to the Grams of their factors.

        Rows go by tiles of r, a factor's own, and tiles by parts of `_PART` bytes: the temporaries are twice that,
        however many rows are split.

        Args:
            grams: (factors, r, r).
            split: (slots, r), summed over ranks.
        """
        if not self.slots:
            return
        r = self._r
        part = max(_PART // (4 * r * r), 1)
        parts = zip(
            self._tiles.split(part * r), self._padding.split(part * r), self._factor_of_tile.split(part), strict=True
        )
        for places, padding, factors in parts:
            tiles = split.index_select(0, places).masked_fill_(padding, 0.0).view(-1, r, r)
            grams.index_add_(0, factors, torch.bmm(tiles.mT, tiles))

    def products(self, split: Tensor, multiplier: Tensor) -> Tensor:
        """Return this rank's elements of (split row · its factor's matrix), in the order of `elements`.

        Args:
            split: (slots, r), summed over ranks.
            multiplier: (factors, r, r).
        """
        if not self.elements.numel():
            return split.view(-1)[:0]
        rows = split.index_select(0, self._own_slots).unsqueeze(1)
        products = torch.bmm(rows, multiplier.index_select(0, self._own_factors))
        return products.view(-1).index_select(0, self._in_own)

    def put(self, out: Tensor, products: Tensor) -> None:
        """Write what `products` returned to its places in the arena's flat `work`."""
        out.index_copy_(0, self.elements, products)


def _tiles(split: Sequence[int], counts: Sequence[int], r: int) -> tuple[Tensor, Tensor]:
    """Return (tiles · r,) slots, r of one factor a tile, filled up with slot Σ counts, and each tile's factor.

    Args:
        split: the factors that have split rows.
        counts: how many each has.
        r: columns of every factor.
    """
    total = sum(counts)
    slots, factors, first = [], [], 0
    for factor, count in zip(split, counts, strict=True):
        for begin in range(0, count, r):
            size = min(r, count - begin)
            slots.append(torch.arange(first + begin, first + begin + size, device="cpu"))
            slots.append(torch.full((r - size,), total, device="cpu"))
            factors.append(factor)
        first += count
    empty = torch.zeros(0, dtype=torch.long, device="cpu")
    return torch.cat([empty, *slots]), torch.tensor(factors, dtype=torch.long, device="cpu")
