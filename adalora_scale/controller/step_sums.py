"""The one all-reduce of an optimizer step.

Gram matrices of whole rows, the elements of split rows, and two sums of squared gradients travel in one flat float32
buffer. What comes back completes the penalty and its gradient, and says whether every gradient on every rank is finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NoReturn

import torch
from torch import Tensor

from adalora_scale.adalora.orthogonality import gradient_norm, penalty
from adalora_scale.controller.arena import Arena, full_float32
from adalora_scale.controller.rows import SplitRows
from adalora_scale.engines.ranks import everywhere
from adalora_scale.engines.span import AdapterTensor, Sharding
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
    """What one call of the optimizer updates of the factors, found once for the same spans."""

    positions: list[int]
    """Of the spans, in the lists of the call."""
    places: list[Tensor]
    """Of the spans, in the arena's `work`."""
    blocks: list[int]
    """Sections of these spans, numbered as in `_Factors`."""
    split: bool
    """Whether a span has elements of a split row."""


class _Factors:
    """The factors of one rank, with their places in the buffer; there is one such rank unless adapters were compacted.

    Each matrix has two, so a tensor of a layer's experts holds as many as there are experts.

    Args:
        sharding: where the adapters are.
        arena: this rank's spans in one order.
        indices: the spans of these factors.
        r: their number of columns.
    """

    def __init__(self, sharding: Sharding, arena: Arena, indices: list[int], r: int) -> None:
        self.indices, self._r, self._arena = tuple(indices), r, arena
        self._number = {index: number for number, index in enumerate(indices)}
        tensors = [sharding.spans[i].tensor for i in indices]
        begins = [0, *accumulate(tensor.matrices for tensor in tensors)]
        self.count = begins.pop()
        """Factors of the whole model."""
        self._triplets = triplets_of(tensors).to(arena.device)
        own_sections = [n for n, s in enumerate(arena.sections) if s.members[0] in self._number]
        sections = [arena.sections[n] for n in own_sections]
        self._members = [section.members for section in sections]
        self._counts = [section.matrices for section in sections]
        self._rows_of = [(arena.weight_columns[n], arena.weight_rows[n], arena.work_rows[n]) for n in own_sections]
        numbers = [n for section in sections for n in section.numbers(lambda span: begins[self._number[span]])]
        self._factors = torch.tensor(numbers, dtype=torch.long, device=arena.device)
        own = [(self._number[piece.span], piece) for piece in arena.row_pieces if piece.span in self._number]
        self._split_spans = {piece.span for _, piece in own}
        self._rows = SplitRows([sharding.cuts[i] for i in indices], tensors, own, r, arena.device)
        self.split_rows = self._rows.slots
        self.size = self.count * r * r + self.split_rows * r
        self._grams = self._split = self._split_products = torch.zeros(0)
        self._matrices: list[Tensor] = []
        self._moved: dict[tuple[int, ...], _Moved] = {}

    def fill(self, buffer: Tensor) -> None:
        """Write Grams of whole rows and the elements of split rows into (size,) zeros, from the arena's `weights`."""
        n, r = self.count, self._r
        self._grams, self._split = buffer[: n * r * r].view(n, r, r), buffer[n * r * r :].view(-1, r)
        if products := [_product(columns, rows) for columns, rows, _ in self._rows_of]:
            self._grams.index_copy_(0, self._factors, torch.cat(products))
        self._rows.write(self._split, self._arena.weights.flat)

    def complete(self, weight: float, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the penalty of these factors and its gradient's norm, once what `fill` wrote is summed over ranks."""
        self._rows.add_gram(self._grams, self._split)
        kept = None if keep is None else keep.index_select(0, self._triplets).view(-1, self._r)
        value, multiplier = penalty(self._grams, weight, kept)
        norm = gradient_norm(self._grams, multiplier)
        self.multiply_by(multiplier)
        return value, norm

    def multiply_by(self, multiplier: Tensor) -> None:
        """Take the matrices (factors, r, r) that turn each factor into its gradient."""
        if self._counts:
            self._matrices = list(multiplier.index_select(0, self._factors).split(self._counts))
        self._split_products = self._rows.products(self._split, multiplier)
        self._grams = self._split = torch.zeros(0)  # views of the buffer, whose memory can go

    def add_gradient(self, indices: tuple[int, ...], gradients: list[Tensor], scale: Tensor | float) -> None:
        """Add the penalty's gradient to those of the gradients, one a span in `indices`, that are these factors'."""
        moved = self._moved_by(indices)
        if not moved.positions:
            return
        arena = self._arena
        arena.work.open(arena.size)
        for block in moved.blocks:
            _, rows, place = self._rows_of[block]
            if rows.dim() == 3:
                torch.bmm(rows, self._matrices[block], out=place)
            else:
                place.copy_(torch.matmul(rows, self._matrices[block].view(*rows.shape[:2], self._r, self._r)))
        if moved.split:
            self._rows.put(arena.work.flat, self._split_products)
        if not (isinstance(scale, float) and scale == 1.0):
            torch._foreach_mul_(moved.places, scale)
        torch._foreach_add_([gradients[i] for i in moved.positions], moved.places)

    def _moved_by(self, indices: tuple[int, ...]) -> _Moved:
        if indices not in self._moved:
            if len(self._moved) > 100:  # of calls before adapters were frozen, or thawed
                self._moved.clear()
            arena = self._arena
            position = {i: number for number, i in enumerate(indices) if i in self._number and i in arena.work_views}
            self._moved[indices] = _Moved(
                positions=list(position.values()),
                places=[arena.work_views[i] for i in position],
                blocks=[n for n, members in enumerate(self._members) if not position.keys().isdisjoint(members)],
                split=not position.keys().isdisjoint(self._split_spans),
            )
        return self._moved[indices]


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
        self._shares = [weight * (group.count / (2 * matrices)) for group in self._groups]

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
            keep: (triplets,) bool of those that the adapters hold, after the final allocation when pruned ones are
                zero, else None.

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
            for group, share in zip(self._groups, self._shares, strict=True):
                value, norm = group.complete(share, keep)
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


def triplets_of(tensors: Sequence[AdapterTensor]) -> Tensor:
    """Return (Σ matrices · r,) int64 on the CPU: which triplet each column of these tensors' matrices is of."""
    own = [torch.arange(t.triplet, t.triplet + t.matrices * t.r, device="cpu") for t in tensors]
    return torch.cat([torch.empty(0, dtype=torch.long, device="cpu"), *own])


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply batches of matrices; of two batch sides they become one."""
    return torch.bmm(left, right) if left.dim() == 3 else torch.matmul(left, right).flatten(0, 1)


def _raise(error: Exception) -> NoReturn:
    raise error
