"""The adapter arena: this rank's spans in one flat float32 order, so that a step is a few batched operations.

Spans of one shape that are cut alike lie next to each other, as a *block*, and the whole rows of a block's spans are
one to three *sections*: of the matrix that a span begins in, of whole matrices, of the one that it ends in. Its dense
matrices and a layer's experts are one section each, (n · matrices, rows, r), however many they are. Index tensors and
views are made once, at attach. The arena has two flat tensors, for weights and for whatever else is worked on
(gradients, the penalty's, masks); tensors come in, and go back, by one multi-tensor operation. Their memory is there
only within a step, and only as much of it as the step needs: for the default score that of λ.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from adalora_scale.adalora.layer import FACTORS
from adalora_scale.engines.span import Sharding, Span


@dataclass(frozen=True)
class Cut:
    """Rows of neighbouring matrices that every member of a block has: rows of one, or whole matrices."""

    begin: int
    """Of the first row's first element, in the member."""
    count: int
    """Matrices."""
    rows: int
    """Of each of them; all that it has where there are several."""


@dataclass(frozen=True)
class Section:
    """The rows of one cut, of all members of a block."""

    cut: Cut
    members: tuple[int, ...]
    """The spans, in the order in which they lie."""
    firsts: tuple[int, ...]
    """The first matrix of each, counted within its tensor."""
    length: int
    """Elements of each member."""
    r: int

    def rows_in(self, flat: Tensor, offset: int) -> Tensor:
        """Return a view of a flat tensor, (members · matrices, rows, r); (members, matrices, rows, r) where several
        members have several matrices and something beside them.

        Args:
            flat: (elements,) contiguous.
            offset: where the block's first element lies in it.
        """
        cut, n, r, each = self.cut, len(self.members), self.r, self.cut.rows * self.r
        shape: tuple[int, ...] = (n, cut.count, cut.rows, r)
        strides: tuple[int, ...] = (self.length, each, r, 1)
        if n == 1 or cut.count == 1 or cut.count * each == self.length:
            apart = self.length if cut.count == 1 else each
            shape, strides = (n * cut.count, cut.rows, r), (apart, r, 1)
        return flat.as_strided(shape, strides, flat.storage_offset() + offset + cut.begin)

    @property
    def matrices(self) -> int:
        """Matrices of all members."""
        return len(self.members) * self.cut.count

    def numbers(self, first: Callable[[int], int], step: int = 1) -> list[int]:
        """Number the matrices of all members.

        Args:
            first: span → the number of its tensor's first matrix.
            step: between one matrix and the next.
        """
        own = range(self.cut.count)
        pairs = zip(self.members, self.firsts, strict=True)
        return [first(span) + (begin + n) * step for span, begin in pairs for n in own]


@dataclass(frozen=True)
class Block:
    """Spans of one shape, equally cut, of tensors of one shape, next to each other."""

    factor: str
    rows: int
    """Rows of a whole matrix; 1 for `lora_E`."""
    r: int
    members: tuple[int, ...]
    """The spans, in the order in which they lie."""
    offset: int
    """Of the first element, in the arena."""
    length: int
    """Elements of each member."""
    sections: tuple[Section, ...]
    """Of what members hold whole rows of; none where there is no whole row."""

    @property
    def size(self) -> int:
        """Elements of all members."""
        return len(self.members) * self.length


@dataclass(frozen=True)
class RowPiece:
    """A span's elements of a row that it does not hold whole: its head or its tail."""

    span: int
    row: int
    """In the whole tensor."""
    column: int
    """Of the first element."""
    position: int
    """Of the first element, in the arena."""
    length: int


class Scratch:
    """A flat float32 tensor whose views are made once, and whose memory is there while it is open."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.flat = torch.empty(size, dtype=torch.float32, device=device)
        """(size,); what it holds is undefined until written to after `open`, and views are made while it is open."""

    def open(self, elements: int) -> None:
        """Have memory for the first elements at least; what is in it stays."""
        storage = self.flat.untyped_storage()
        needed = elements * self.flat.element_size()
        if storage.nbytes() < needed:
            storage.resize_(needed)

    def close(self) -> None:
        """Give the memory back."""
        self.flat.untyped_storage().resize_(0)


class Arena:
    """The order, the two flat tensors, and their views.

    Args:
        sharding: where the adapters are. An engine may give them other memory; `follow` notices.
    """

    def __init__(self, sharding: Sharding) -> None:
        self._sharding = sharding
        spans = sharding.spans
        self.tensors = [span.tensor for span in spans]
        """Of every span."""
        self.device = spans[0].weight.device
        self.blocks = _blocks(spans)
        """λ's first."""
        self.size = sum(block.size for block in self.blocks)
        self.offsets = begins_in(self.blocks, [block.offset for block in self.blocks])
        """Span → its first element; spans without an element have none."""
        offsets = self.offsets
        self.row_pieces = [piece for index, offset in offsets.items() for piece in _row_pieces(index, spans, offset)]
        self.weights, self.work = Scratch(self.size, self.device), Scratch(self.size, self.device)
        self._weight_views = {i: self._view(self.weights, spans[i], offset) for i, offset in offsets.items()}
        self.work_views = {i: self._view(self.work, spans[i], offset) for i, offset in offsets.items()}
        """Span → its place in `work`, shaped as the engine holds it; spans without an element have none."""
        placed = [(section, block.offset) for block in self.blocks for section in block.sections]
        self.sections = [section for section, _ in placed]
        self.weight_rows = [section.rows_in(self.weights.flat, offset) for section, offset in placed]
        self.weight_columns = [rows.mT for rows in self.weight_rows]
        """The whole rows of every section, (…, rows, r) and (…, r, rows)."""
        self.work_rows = [section.rows_in(self.work.flat, offset) for section, offset in placed]
        self._plans: dict[Collection[int], tuple[list[int], list[Tensor], int]] = {}
        self._held: list[Tensor] = []
        self._spans: list[Span] | None = None
        self.held()
        self.close()

    @property
    def lambda_size(self) -> int:
        """Elements of λ, which lie first."""
        return sum(block.size for block in self.blocks if block.factor == "lora_E")

    def end_of(self, spans: Collection[int]) -> int:
        """Return how much of the flat tensors is needed for these spans."""
        chosen = set(spans)
        return max((b.offset + b.size for b in self.blocks if chosen.intersection(b.members)), default=0)

    def held(self) -> list[Tensor]:
        """Return every span's weight where the optimizer keeps it now, shaped as the engine holds it."""
        if self._spans is not self._sharding.spans:
            self._spans = self._sharding.spans
            self._held = [span.weight.view(span.shape) for span in self._spans]
        return self._held

    def read_weights(self, spans: tuple[int, ...]) -> None:
        """Bring these spans' weights of now into `weights`."""
        if spans not in self._plans:
            chosen = [i for i in spans if i in self._weight_views]
            self._plans[spans] = chosen, [self._weight_views[i] for i in chosen], self.end_of(chosen)
        chosen, views, end = self._plans[spans]
        if chosen:
            held = self.held()
            self.weights.open(end)
            torch._foreach_copy_(views, [held[i] for i in chosen])

    def close(self) -> None:
        """Give the memory of the flat tensors back, at the end of a step."""
        self.weights.close()
        self.work.close()

    def _view(self, scratch: Scratch, span: Span, offset: int) -> Tensor:
        return scratch.flat[offset : offset + span.weight.numel()].view(span.shape)


def first_elements(blocks: Sequence[Block]) -> list[int]:
    """Return where each block begins in a flat tensor that holds these blocks alone."""
    return [0, *accumulate(block.size for block in blocks)][:-1]


def begins_in(blocks: Sequence[Block], begins: Sequence[int]) -> dict[int, int]:
    """Return span → its first element in a flat tensor in which these blocks begin at `begins`."""
    pairs = zip(blocks, begins, strict=True)
    return {member: begin + n * block.length for block, begin in pairs for n, member in enumerate(block.members)}


def _blocks(spans: Sequence[Span]) -> list[Block]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, span in enumerate(spans):
        tensor, length = span.tensor, span.weight.numel()
        if length:
            kind = FACTORS.index(tensor.factor)
            cuts = tuple((cut.begin, cut.count, cut.rows) for cut, _ in _cuts(span))
            key = (tensor.factor != "lora_E", span.group, kind, tensor.rows, tensor.r, length, cuts)
            groups.setdefault(key, []).append(index)
    blocks, offset = [], 0
    for key in sorted(groups):
        *_, kind, rows, r, length, _ = key
        members = tuple(groups[key])
        found = [_cuts(spans[i]) for i in members]
        sections = tuple(
            Section(cut, members, tuple(own[n][1] for own in found), length, r) for n, (cut, _) in enumerate(found[0])
        )
        block = Block(FACTORS[kind], rows, r, members, offset, length, sections)
        blocks.append(block)
        offset += block.size
    return blocks


def _cuts(span: Span) -> list[tuple[Cut, int]]:
    """Return the whole rows of a span, cut where its tensor's matrices end, with the first matrix of each cut."""
    rows, r = span.tensor.rows, span.tensor.r
    head = min(-span.start % r, span.weight.numel())
    row = (span.start + head) // r
    left = (span.weight.numel() - head) // r
    found = []
    begun = min(-row % rows, left)
    for count, each in ((1, begun), ((left - begun) // rows, rows), (1, (left - begun) % rows)):
        if count and each:
            found.append((Cut(head, count, each), row // rows))
            head, row = head + count * each * r, row + count * each
    return found


def _row_pieces(index: int, spans: Sequence[Span], position: int) -> list[RowPiece]:
    span = spans[index]
    start, length, r = span.start, span.weight.numel(), span.tensor.r
    head = min(-start % r, length)
    tail = (length - head) % r
    pieces = [RowPiece(index, start // r, start % r, position, head)] if head else []
    if tail:
        first = length - tail
        pieces.append(RowPiece(index, (start + first) // r, 0, position + first, tail))
    return pieces


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Compute float32 products in float32, whatever `allow_tf32` or `set_float32_matmul_precision` say."""
    kinds = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [kind.fp32_precision for kind in kinds]
    try:
        for kind in kinds:
            kind.fp32_precision = "ieee"
        yield
    finally:
        for kind, value in zip(kinds, before, strict=True):
            kind.fp32_precision = value
