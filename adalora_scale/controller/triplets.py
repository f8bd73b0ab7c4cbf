"""Triplets over this rank's spans: removing those outside a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_scale.controller.arena import Arena
from adalora_scale.engines.span import Sharding


class Triplets:
    """λ, columns and moments of this rank's spans, all of modules of r triplets.

    Args:
        sharding: where the adapters are.
        arena: this rank's spans in one order.
        r: triplets of each module.
    """

    def __init__(self, sharding: Sharding, arena: Arena, r: int) -> None:
        self._sharding, self._arena, self._r = sharding, arena, r
        spans, device = sharding.spans, arena.device
        own = [b for b in arena.blocks if b.factor == "lora_E"]
        self._lambdas = [member for block in own for member in block.members]
        triplets: list[int] = []
        for index in self._lambdas:
            first = spans[index].tensor.layer * r + spans[index].start
            triplets += range(first, first + spans[index].weight.numel())
        self._triplets = torch.tensor(triplets, dtype=torch.long, device=device)  # of λ's elements in the arena
        self._keep = torch.empty(len(triplets), dtype=torch.float32, device=device)
        self._keeps = list(self._keep.split([spans[index].weight.numel() for index in self._lambdas]))
        self._keep_of: Tensor | None = None
        self._all = sorted(arena.work_views)
        self._layers = torch.tensor([n for b in arena.blocks for n in b.layers], dtype=torch.long, device=device)
        elements: list[int] = []
        columns: list[int] = []
        for piece in arena.row_pieces:
            elements += range(piece.position, piece.position + piece.length)
            first = spans[piece.span].tensor.layer * r + piece.column
            columns += range(first, first + piece.length)
        self._split = torch.tensor(elements, dtype=torch.long, device=device)
        self._split_triplets = torch.tensor(columns, dtype=torch.long, device=device)

    @torch.no_grad()
    def zero_lambda(self, mask: Tensor) -> None:
        """Zero λ outside `mask` (modules · r,) in this rank's masters and in low-precision copies already made."""
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
        rows = keep.view(-1, self._r).index_select(0, self._layers).unsqueeze(1)
        for place, row in zip(arena.work_rows, rows.split([len(b.members) for b in arena.blocks]), strict=True):
            place.copy_(row)
        if self._split.numel():
            arena.work.flat.index_copy_(0, self._split, keep.index_select(0, self._split_triplets))
        targets = [(tensor, index) for index in self._all for tensor in (held[index], *moments[index])]
        if targets:
            torch._foreach_mul_([tensor for tensor, _ in targets], [arena.work_views[index] for _, index in targets])
        arena.work.close()
        self._sharding.publish()
        return any(not moments[index] for index in self._all)
