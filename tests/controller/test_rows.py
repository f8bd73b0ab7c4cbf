"""Rows split between ranks: Gram and gradient from pieces equal those of the whole tensor, wherever the cuts fall."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from adalora_scale.controller.arena import Arena
from adalora_scale.controller.column_sums import ColumnSums
from adalora_scale.controller.rows import SplitRows
from adalora_scale.controller.step_sums import _Factors
from adalora_scale.engines.span import AdapterTensor, Span
from adalora_scale.engines.zero_layouts import multiples_within
from adalora_scale.errors import Unsupported
from benchmarks.pricing.counting import Counter

R = 5
CPU = torch.device("cpu")


def pieces_of(numel, cuts):
    edges = [0, *cuts, numel]
    return [(start if end > start else 0, end - start) for start, end in itertools.pairwise(edges)]


def tensors_of(factors, matrices):
    """The adapter tensors whose values `factors` are, each of as many matrices."""
    return [
        AdapterTensor(n, f"m{n}", "lora_A", len(f) // matrices, R, matrices, n * matrices, n * matrices * R)
        for n, f in enumerate(factors)
    ]


class Rank:
    """One fake rank: the arena of its pieces of some factors, (start, length) of each."""

    def __init__(self, factors, own, ranks, multiplier, matrices=1):
        self.spans = [
            Span(tensor, start, f.flatten()[start : start + size], (size,))
            for tensor, f, (start, size) in zip(tensors_of(factors, matrices), factors, own, strict=True)
        ]
        self.cuts = []
        for factor, each in zip(factors, zip(*ranks, strict=True), strict=True):
            edges = {edge for start, size in each for edge in (start, start + size) if size}
            self.cuts.append(torch.tensor(sorted(edges - {0, factor.numel()}), dtype=torch.long))
        self.arena = Arena(self)
        self.indices = tuple(range(len(factors)))
        self.factors = _Factors(self, self.arena, list(self.indices), R)
        self.arena.read_weights(self.indices)
        self.buffer = torch.zeros(self.factors.size)
        self.factors.fill(self.buffer)
        self.multiplier = multiplier


def gram_and_gradient(factors, ranks, multiplier, matrices):
    """What fake ranks with these (start, length) of every factor find together."""
    found = [Rank(factors, own, ranks, multiplier, matrices) for own in ranks]
    total = torch.stack([rank.buffer for rank in found]).sum(0)
    gradients = [torch.zeros(f.numel()) for f in factors]
    grams = []
    for rank, own in zip(found, ranks, strict=True):
        summed = rank.buffer.copy_(total)
        rank.factors._rows.add_gram(rank.factors._grams, rank.factors._split)
        grams.append(summed[: len(multiplier) * R * R].view(-1, R, R))
        rank.factors.multiply_by(multiplier)
        targets = [g[start : start + length] for g, (start, length) in zip(gradients, own, strict=True)]
        rank.factors.add_gradient(rank.indices, targets, 1.0)
    assert all(torch.equal(grams[0], other) for other in grams)
    return grams[0], gradients


def assert_equals_whole(factors, ranks, matrices=1):
    # Small integers are exact in float32, whatever the order of a sum.
    multiplier = integers(len(factors) * matrices, R, R, seed=1)
    grams, gradients = gram_and_gradient(factors, ranks, multiplier, matrices)
    each = [matrix for factor in factors for matrix in factor.chunk(matrices)]
    found = [matrix for g, f in zip(gradients, factors, strict=True) for matrix in g.view_as(f).chunk(matrices)]
    for matrix, gram, gradient, own in zip(each, grams, found, multiplier, strict=True):
        assert torch.equal(gram, matrix.T @ matrix)
        assert torch.equal(gradient, matrix @ own)


def factors_of(*rows):
    return [integers(n, R, seed=n) for n in rows]


def integers(*shape, seed):
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


def cut_at(factors, count, offset):
    """(start, length) of every factor on every rank, cut into about equal pieces that are moved by `offset`."""
    each = (
        pieces_of(f.numel(), [min(f.numel(), offset + i * f.numel() // count) for i in range(1, count)])
        for f in factors
    )
    return list(zip(*each, strict=True))


@pytest.mark.parametrize("offset", range(R + 1))
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_cut_modulo_r(count, offset):
    """Else the penalty is wrong at those numbers of ranks whose pieces end inside a row."""
    factors = factors_of(7, 4)
    assert_equals_whole(factors, cut_at(factors, count, offset))


@pytest.mark.parametrize("offset", [0, 1, R - 1, R, 2 * R + 3])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize(("matrices", "rows"), [(5, (3, 3)), (7, (2, 1, 2))])
def test_every_cut_of_experts(count, matrices, rows, offset):
    """Else the penalty of a layer's experts is wrong where a piece begins or ends inside an expert."""
    factors = factors_of(*(matrices * each for each in rows))
    assert_equals_whole(factors, cut_at(factors, count, offset), matrices)


@pytest.mark.parametrize(("matrices", "rows"), [(8, 5), (128, 5), (128, 1)])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_tensor_of_experts_is_at_most_three_sections(matrices, rows, count):
    """Else a step's operations grow with the number of experts."""
    factors = factors_of(matrices * rows, matrices * rows)
    for own in (ranks := cut_at(factors, count, 3)):
        arena = Rank(factors, own, ranks, None, matrices).arena
        assert len(arena.blocks) == 1
        assert len(arena.sections) <= 3
        assert sum(section.matrices for section in arena.sections) >= 2 * (matrices // count - 2)


@pytest.mark.parametrize("count", [2, 3])
def test_operations_of_pieces_do_not_grow_with_experts(count):
    """Else only whole tensors are cheap, and a sharded mixture pays for each of its experts."""
    found = []
    for matrices in (8, 128):
        factors = factors_of(*[matrices * 7] * 4)
        ranks = cut_at(factors, count, 3)
        rank = Rank(factors, ranks[1], ranks, None, matrices)
        flat, blocks = rank.arena.weights.flat, rank.arena.blocks
        sums = ColumnSums(rank.arena, blocks, 4 * matrices, R)
        gradients = [torch.zeros(size) for _, size in ranks[1]]
        rank.factors.add_gradient((), [], 1.0)
        with Counter() as counter:
            rank.factors.fill(rank.buffer)
            rank.factors.complete(1.0, torch.ones(4 * matrices * R, dtype=torch.bool))
            rank.factors.add_gradient(rank.indices, gradients, 1.0)
            sums.of([flat[b.offset : b.offset + b.size] for b in blocks])
        found.append(counter.operations)
        assert rank.factors.split_rows > 0 and max(rows.dim() for rows in rank.arena.weight_rows) == 4
    assert found[0] == found[1] < 120


@pytest.mark.parametrize("first", range(1, R))
@pytest.mark.parametrize("second", range(1, R))
def test_one_row_between_three_ranks_and_a_piece_within_a_row(first, second):
    """Else a rank whose piece neither begins nor ends a row loses it."""
    low, high = sorted((first, second))
    (factor,) = factors_of(4)
    assert_equals_whole([factor], [[piece] for piece in pieces_of(factor.numel(), [R + low, R + high])])


def test_more_split_rows_of_one_factor_than_r():
    """Else the rows that do not fit into one tile are left out of the Gram."""
    factors = factors_of(23, 6)
    assert_equals_whole(factors, cut_at(factors, 11, 1))


def test_ranks_without_a_piece():
    """Else a rank that owns nothing of a factor breaks the others' sums."""
    (factor,) = factors_of(2)
    assert_equals_whole([factor], [[piece] for piece in pieces_of(factor.numel(), [0, 3, 3])])


def test_whole_rows_use_no_slot():
    """Else the all-reduced buffer grows with the model although nothing is split."""
    assert SplitRows([torch.tensor([10, 20])], tensors_of(factors_of(8), 1), [], R, CPU).slots == 0


def test_a_piece_that_ends_where_no_cut_is_known_is_an_error():
    """Else its elements go to another row's slot, and the penalty is wrong in silence."""
    spans = [Span(AdapterTensor(0, "m", "lora_A", 4, R), 0, torch.ones(7), (7,))]
    with pytest.raises(Unsupported, match="inside row 1"):
        _Factors(fake := SimpleNamespace(spans=spans, cuts=[torch.tensor([15])]), Arena(fake), [0], R)


def test_bounded_memory_at_many_ranks():
    """96 ranks that split a row of each of 1,120 factors took two temporaries of 1.7 GB at r = 64; 10 ranks 16 here."""
    factors, r = 70, 16
    cuts = [torch.arange(1, 10) * 333] * factors
    tensors = [AdapterTensor(n, "m", "lora_A", 300, r, 1, n, n * r) for n in range(factors)]
    rows = SplitRows(cuts, tensors, [], r, CPU)
    split = integers(rows.slots, r, seed=0)
    grams = torch.zeros(factors, r, r)
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in [out] if isinstance(t, torch.Tensor))
            return out

    with Sizes():
        rows.add_gram(grams, split)
    expected = (split.unsqueeze(2) * split.unsqueeze(1)).view(factors, -1, r, r).sum(1)
    assert torch.equal(grams, expected)
    assert max(sizes) <= split.numel() + grams.numel() < rows.slots * r * r


def test_temporaries_do_not_grow_with_split_rows():
    """1,000 ranks split a million rows of a 70 B model at r = 64: 278 MB, of which two more copies were made."""
    factors, r = 3, 64
    tensors = [AdapterTensor(n, f"m{n}", "lora_A", 41_000, r, 1, n, n * r) for n in range(factors)]
    rows = SplitRows([torch.arange(1, 40_000) * 65] * factors, tensors, [], r, CPU)
    split, grams = integers(rows.slots, r, seed=0), torch.zeros(factors, r, r)
    largest = 0

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(t.nbytes for t in [out] if isinstance(t, torch.Tensor))])
            return out

    with Sizes():
        rows.add_gram(grams, split)
    each = split.view(factors, -1, r)
    assert torch.equal(grams, each.mT @ each)
    assert largest <= 16 * 2**20 < split.nbytes // 1.5


@pytest.mark.parametrize(("step", "begin", "end"), [(3, 0, 9), (3, 2, 10), (4, 4, 8), (5, 1, 4), (7, 0, 0), (1, 3, 6)])
def test_cuts_are_the_multiples_between(step, begin, end):
    """Else ranks disagree on which rows they share."""
    expected = [value for value in range(begin + 1, end) if value % step == 0]
    assert multiples_within(step, begin, end).tolist() == expected


@pytest.mark.parametrize("offset", range(R + 1))
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("matrices", "rows"), [(1, (7, 4, 7)), (3, (15, 6, 15))])
def test_column_sums_of_pieces_add_up_to_the_whole(count, matrices, rows, offset):
    """ZeRO's flat pieces begin and end inside rows; one wrong offset shifts every triplet's score by one."""
    factors = factors_of(*rows)
    total = torch.zeros(len(factors) * matrices * R)
    for own in cut_at(factors, count, offset):
        rank = Rank(factors, own, cut_at(factors, count, offset), None, matrices)
        flat = rank.arena.weights.flat
        values = [flat[b.offset : b.offset + b.size] for b in rank.arena.blocks]
        total += ColumnSums(rank.arena, rank.arena.blocks, len(factors) * matrices, R).of(values)
    assert torch.equal(total, torch.cat([matrix.sum(0) for factor in factors for matrix in factor.chunk(matrices)]))
