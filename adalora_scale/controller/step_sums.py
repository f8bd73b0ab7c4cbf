"""The one all-reduce of an optimizer step.

Gram matrices of whole rows, the elements of split rows, and two sums of squared gradients travel in one flat float32
buffer. What comes back completes the penalty and its gradient, and says whether every gradient on every rank is finite.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from adalora_scale.adalora.orthogonality import gradient_norm, penalty
from adalora_scale.controller.arena import Arena, full_float32
from adalora_scale.controller.rows import SplitRows
from adalora_scale.engines.ranks import everywhere
from adalora_scale.engines.span import Sharding
from adalora_scale.errors import Unsupported, UserError


@dataclass
class StepSums:
    """What all ranks know of the step in progress."""

    adapter_squares: Tensor
    """Sum of the adapters' squared gradients."""
    finite: bool
    """Whether every gradient of every parameter of the optimizer is, on every rank."""
    penalty: Tensor
    """The orthogonality penalty R."""
    penalty_gradient_norm: Tensor
    """Norm of its gradient."""


@dataclass(frozen=True)
class _Moved:
    """What one call of the optimizer updates of the factors: views and indices that are made once for the same spans."""

    positions: list[int]
    """Of the spans, in the lists of the call."""
    places: list[Tensor]
    """Of the spans, in the arena's `work`."""
    products: list[tuple[Tensor, Tensor]]
    """The whole rows in the arena's `weights` and `work`, (members, rows, r) of every block."""
    factors: Tensor
    """Which factors the members of those blocks are."""
    counts: list[int]
    """Members of each of those blocks."""


class _Factors:
    """The factors of one rank, with their places in the buffer; there is one such rank unless adapters were compacted.

    Args:
        sharding: where the adapters are.
        arena: this rank's spans in one order.
        indices: the spans of these factors.
        r: their number of columns.
    """

    def __init__(self, sharding: Sharding, arena: Arena, indices: list[int], r: int) -> None:
        self.indices, self._r, self._arena = tuple(indices), r, arena
        self._number = {index: number for number, index in enumerate(indices)}
        layers = [sharding.spans[i].tensor.layer for i in indices]
        self._layer_of_factor = torch.tensor(layers, dtype=torch.long, device=arena.device)
        self._blocks = [n for n, b in enumerate(arena.blocks) if b.whole and b.members[0] in self._number]
        self._factors = self._factors_of(self._blocks)
        own = [(self._number[piece.span], piece) for piece in arena.row_pieces if piece.span in self._number]
        self._rows = SplitRows([sharding.cuts[i] for i in indices], own, r, arena.device)
        self.split_rows = self._rows.slots
        self.size = len(indices) * r * r + self.split_rows * r
        self._multiplier = torch.zeros(0)
        self._split = torch.zeros(0)
        self._moved: dict[tuple[int, ...], _Moved] = {}

    def fill(self, buffer: Tensor) -> None:
        """Write Grams of whole rows and the elements of split rows into (size,) zeros, from the arena's `weights`."""
        grams, split = self._parts(buffer)
        arena = self._arena
        if products := [torch.bmm(arena.weight_columns[n], arena.weight_rows[n]) for n in self._blocks]:
            grams.index_copy_(0, self._factors, torch.cat(products))
        self._rows.write(split, self._arena.weights.flat)

    def complete(self, buffer: Tensor, weight: float, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the penalty and of its gradient's norm, from the summed buffer."""
        grams, split = self._parts(buffer)
        self._rows.add_gram(grams, split)
        kept = None if keep is None else keep.view(-1, self._r)[self._layer_of_factor]
        value, self._multiplier = penalty(grams, weight, kept)
        self._split = split
        return value, gradient_norm(grams, self._multiplier)

    def add_gradient(self, indices: tuple[int, ...], gradients: list[Tensor], scale: Tensor | float) -> None:
        """Add the penalty's gradient to those of the gradients, one a span in `indices`, that are these factors'."""
        moved = self._moved_by(indices)
        if not moved.positions:
            return
        arena = self._arena
        arena.work.open(arena.size)
        multiplier = self._multiplier * scale
        matrices = multiplier.index_select(0, moved.factors).split(moved.counts)
        for (rows, place), matrix in zip(moved.products, matrices, strict=True):
            torch.bmm(rows, matrix, out=place)
        self._rows.put_products(arena.work.flat, self._split, multiplier)
        torch._foreach_add_([gradients[i] for i in moved.positions], moved.places)

    def _moved_by(self, indices: tuple[int, ...]) -> _Moved:
        if indices not in self._moved:
            if len(self._moved) > 100:  # of calls before adapters were frozen, or thawed
                self._moved.clear()
            arena = self._arena
            position = {i: number for number, i in enumerate(indices) if i in self._number and i in arena.work_views}
            blocks = [n for n in self._blocks if any(member in position for member in arena.blocks[n].members)]
            self._moved[indices] = _Moved(
                positions=list(position.values()),
                places=[arena.work_views[i] for i in position],
                products=[(arena.weight_rows[n], arena.work_rows[n]) for n in blocks],
                factors=self._factors_of(blocks),
                counts=[len(arena.blocks[n].members) for n in blocks],
            )
        return self._moved[indices]

    def _factors_of(self, blocks: list[int]) -> Tensor:
        numbers = [self._number[member] for n in blocks for member in self._arena.blocks[n].members]
        return torch.tensor(numbers, dtype=torch.long, device=self._arena.device)

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        n, r = len(self.indices), self._r
        return buffer[: n * r * r].view(n, r, r), buffer[n * r * r :].view(-1, r)


class StepReduction:
    """Sums over ranks, and the penalty's gradient for this rank's spans.

    Args:
        sharding: where the adapters are.
        arena: this rank's spans in one order.
        matrices: adapted matrices of the model, those without a triplet included.
        weight: orth_reg_weight; with 0 only the sums of squares are reduced.
    """

    def __init__(self, sharding: Sharding, arena: Arena, matrices: int, weight: float) -> None:
        self._sharding, self._weight = sharding, weight
        self._device = arena.device
        by_rank: dict[int, list[int]] = {}
        for index, span in enumerate(sharding.spans):
            if span.tensor.factor != "lora_E":
                by_rank.setdefault(span.tensor.r, []).append(index)
        self._groups = [_Factors(sharding, arena, by_rank[r], r) for r in sorted(by_rank)]
        self._shares = [weight * (len(group.indices) / (2 * matrices)) for group in self._groups]

    @property
    def spans(self) -> tuple[int, ...]:
        """The spans whose weights of before the update `run` reads in the arena; none without a penalty."""
        return tuple(i for group in self._groups for i in group.indices) if self._weight else ()

    @property
    def split_rows(self) -> int:
        """Rows of which several ranks hold pieces."""
        return sum(group.split_rows for group in self._groups)

    def run(self, squares: Tensor, keep: Tensor | None) -> StepSums:
        """Reduce over ranks and prepare the penalty's gradient.

        Args:
            squares: (2,) this rank's sums of squared gradients, of the adapters and of everything.
            keep: (modules · r,) bool after the final allocation when pruned triplets are zero, else None.

        Raises:
            UserError, Unsupported: a rank withdrew from the step.
        """
        zero = torch.zeros((), dtype=torch.float32, device=self._device)
        if self._weight == 0:
            self._sharding.all_reduce(squares)
            self._sharding.agree(squares)
            return StepSums(squares[0], self._finite(squares[1]), zero, zero)
        sizes = [group.size for group in self._groups]
        buffer = torch.zeros(sum(sizes) + 2, dtype=torch.float32, device=self._device)
        parts = buffer[:-2].split(sizes)
        with full_float32():
            for group, part in zip(self._groups, parts, strict=True):
                group.fill(part)
        buffer[-2:] = squares
        self._sharding.all_reduce(buffer)
        self._sharding.agree(buffer[-2:])
        finite = self._finite(buffer[-1])
        values, norms = [], []
        with full_float32():
            for group, part, share in zip(self._groups, parts, self._shares, strict=True):
                value, norm = group.complete(part, share, keep)
                values.append(value)
                norms.append(norm)
        if len(values) == 1:
            return StepSums(buffer[-2], finite, values[0], norms[0])
        return StepSums(buffer[-2], finite, torch.stack(values).sum(), torch.stack(norms).norm())

    def withdraw(self, error: UserError | Unsupported) -> NoReturn:
        """Raise this rank's error on every rank: the others are, or will be, in `run` of the same step.

        Else they would wait for this rank in their next collective until the group's timeout.

        Raises:
            UserError, Unsupported: as `error`, with the rank's number unless all ranks say the same.
        """
        size = sum(group.size for group in self._groups) if self._weight else 0
        buffer = torch.full((size + 2,), torch.nan, dtype=torch.float32, device=self._device)
        self._sharding.all_reduce(buffer)
        self._sharding.agree(buffer[-2:])
        everywhere(lambda: _raise(error))
        raise error

    def _finite(self, all_squares: Tensor) -> bool:
        finite = math.isfinite(all_squares.item())  # the step's one read
        if not finite:
            everywhere(lambda: None)  # not a gradient but a rank that withdrew from the step?
        return finite

    def add_penalty_gradient(self, indices: list[int], gradients: list[Tensor], scale: Tensor | float) -> None:
        """Add the penalty's gradient to these spans' gradients in place.

        Args:
            indices: spans, as in `Sharding.spans`.
            gradients: their gradients.
            scale: factor that the gradients carry (a GradScaler's).
        """
        if self._weight == 0:
            return
        with full_float32():
            for group in self._groups:
                group.add_gradient(tuple(indices), gradients, scale)


def _raise(error: Exception) -> NoReturn:
    raise error
