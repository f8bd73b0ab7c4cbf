"""Triplets over this rank's spans: removing those outside a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_scale.controller.arena import Arena, Section
from adalora_scale.engines.span import Sharding


class Triplets:
    """λ, columns and moments of this rank's spans.

    Masks are of the triplets that the adapters hold: (triplets,) bool, matrix by matrix.

    Args:
        sharding: where the adapters are.
        arena: this rank's spans in one order.
    """

    def __init__(self, sharding: Sharding, arena: Arena) -> None:
        self._sharding, self._arena = sharding, arena
        spans, device = sharding.spans, arena.device
        own = [b for b in arena.blocks if b.factor == "lora_E"]
        self._lambdas = [member for block in own for member in block.members]
        triplets: list[int] = []
        for index in self._lambdas:
            first = spans[index].tensor.triplet + spans[index].start
            triplets += range(first, first + spans[index].weight.numel())
        self._triplets = torch.tensor(triplets, dtype=torch.long, device=device)  # of λ's elements in the arena
        self._keep = torch.empty(len(triplets), dtype=torch.float32, device=device)
        self._keeps = list(self._keep.split([spans[index].weight.numel() for index in self._lambdas]))
        self._keep_of: Tensor | None = None
        self._all = sorted(arena.work_views)
        columns_of = [_columns(section, arena) for section in arena.sections]
        self._sizes = [len(found) for found in columns_of]
        self._columns = torch.cat([torch.empty(0, dtype=torch.long, device="cpu"), *columns_of]).to(device)
        elements: list[int] = []
        columns: list[int] = []
        for piece in arena.row_pieces:
            elements += range(piece.position, piece.position + piece.length)
            tensor = arena.tensors[piece.span]
            first = tensor.triplet + piece.row // tensor.rows * tensor.r + piece.column
            columns += range(first, first + piece.length)
        self._split = torch.tensor(elements, dtype=torch.long, device=device)
        self._split_triplets = torch.tensor(columns, dtype=torch.long, device=device)

    @torch.no_grad()
    def zero_lambda(self, mask: Tensor) -> None:
        """Zero λ outside `mask` in this rank's masters and in low-precision copies already made."""
        if self._keep_of is not mask:  # it does not change after the final allocation
            torch.index_select(mask.to(torch.float32), 0, self._triplets, out=self._keep)
            self._keep_of = mask
        if self._lambdas:
            spans = self._sharding.spans
            torch._foreach_mul_([spans[index].weight for index in self._lambdas], self._keeps)
        self._sharding.publish()

    @torch.no_grad()
    def zero(self, mask: Tensor) -> bool:
        """Zero λ, both columns and the optimizer's moments of the triplets outside `mask`.

        Returns:
            Whether something is left in the optimizer that may move the columns again: 8-bit optimizers keep codes, in
            which 0 is no zero.
        """
        arena, held, moments = self._arena, self._arena.held(), self._sharding.moments()
        arena.work.open(arena.size)
        keep = mask.to(torch.float32)
        rows = keep.index_select(0, self._columns).split(self._sizes)
        for section, place, row in zip(arena.sections, arena.work_rows, rows, strict=True):
            place.copy_(row.view(*place.shape[:-2], 1, section.r))
        if self._split.numel():
            arena.work.flat.index_copy_(0, self._split, keep.index_select(0, self._split_triplets))
        targets = [(tensor, index) for index in self._all for tensor in (held[index], *moments[index])]
        if targets:
            torch._foreach_mul_([tensor for tensor, _ in targets], [arena.work_views[index] for _, index in targets])
        arena.work.close()
        self._sharding.publish()
        return any(not moments[index] for index in self._all)


def _columns(section: Section, arena: Arena) -> Tensor:
    """Return (matrices · r,) int64 on the CPU: which triplet each column of a section's matrices is of."""
    numbers = section.numbers(lambda span: arena.tensors[span].triplet, section.r)
    firsts = torch.tensor(numbers, dtype=torch.long, device="cpu")
    return (firsts.unsqueeze(1) + torch.arange(section.r, device="cpu")).view(-1)
