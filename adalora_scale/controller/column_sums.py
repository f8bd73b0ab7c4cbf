"""From what each element adds to the score of its triplet to one number a triplet, over all spans of this rank."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adalora_scale.controller.arena import Arena, Block, begins_in, first_elements


class ColumnSums:
    """Sums over rows and factors; always in the same order, so that a run repeats bit for bit.

    Args:
        arena: this rank's spans.
        blocks: those that are summed over, in order.
        matrices: number of adapted matrices, each of r triplets.
        r: triplets of each.
    """

    def __init__(self, arena: Arena, blocks: Sequence[Block], matrices: int, r: int) -> None:
        self._blocks, self._r = list(blocks), r
        first_row = 0
        rows_of: list[list[int]] = [[] for _ in range(matrices)]  # rows of the table below that are a matrix's
        for block in self._blocks:
            for section in block.sections:
                for number, matrix in enumerate(section.numbers(lambda span: arena.tensors[span].matrix)):
                    rows_of[matrix].append(first_row + number)
                first_row += section.matrices
        elements: list[int] = []
        places: list[int] = []
        begins = begins_in(self._blocks, first_elements(self._blocks))  # among the values
        pieces = [piece for piece in arena.row_pieces if piece.span in begins]
        for number, piece in enumerate(pieces):
            begin = begins[piece.span] + piece.position - arena.offsets[piece.span]
            elements += range(begin, begin + piece.length)
            places += range(number * r + piece.column, number * r + piece.column + piece.length)
            tensor = arena.tensors[piece.span]
            rows_of[tensor.matrix + piece.row // tensor.rows].append(first_row + number)
        self._pieces = len(pieces)
        nothing = first_row + len(pieces)  # a row of zeros
        most = max(map(len, rows_of))
        table = [[*own, *[nothing] * (most - len(own))] for own in rows_of]
        self._table = torch.tensor(table, dtype=torch.long, device=arena.device)
        self._elements = torch.tensor(elements, dtype=torch.long, device=arena.device)
        self._places = torch.tensor(places, dtype=torch.long, device=arena.device)

    def of(self, values: Sequence[Tensor]) -> Tensor:
        """Return (matrices · r,) float32, ordered by (matrix, k).

        Args:
            values: what each element adds, (size,) of every block.
        """
        zeros = torch.zeros(self._pieces + 1, self._r, dtype=torch.float32, device=self._table.device)
        if self._pieces:
            zeros.view(-1).index_copy_(0, self._places, torch.cat(list(values)).index_select(0, self._elements))
        sums = [
            _flat(section.rows_in(value, 0).sum(-2))
            for block, value in zip(self._blocks, values, strict=True)
            for section in block.sections
        ]
        return torch.cat([*sums, zeros])[self._table].sum(1).view(-1)


def _flat(sums: Tensor) -> Tensor:
    return sums if sums.dim() == 2 else sums.flatten(0, 1)
