"""Rows split between ranks: Gram and gradient from pieces equal those of the whole tensor, wherever the cuts fall."""

import itertools

import pytest
import torch

from adalora_scale.adalora.orthogonality import add_penalty_gradient, gram
from adalora_scale.controller.rows import FactorRows

R = 5
CPU = torch.device("cpu")


def pieces_of(numel, cuts):
    edges = [0, *cuts, numel]
    return [(start if end > start else 0, end - start) for start, end in itertools.pairwise(edges)]


def gram_and_gradient(factors, ranks, multiplier):
    """What fake ranks with these (start, length) of every factor find together."""
    extents = [[rank[factor] for factor in range(len(factors))] for rank in ranks]
    grams, split, found = 0, 0, []
    for own in extents:
        rows = FactorRows(own, extents, R, CPU)
        pieces = [f.flatten()[start : start + length] for f, (start, length) in zip(factors, own, strict=True)]
        slots = torch.zeros(rows.slots, R)
        rows.write_split(slots, pieces)
        grams, split = grams + gram(rows.whole(pieces), R), split + slots
        found.append((rows, pieces))
    grams = grams.index_add(0, rows.factor_of_slot, split.unsqueeze(2) * split.unsqueeze(1))
    gradients = [torch.zeros(f.numel()) for f in factors]
    for (rows, pieces), own in zip(found, extents, strict=True):
        targets = [g[start : start + length] for g, (start, length) in zip(gradients, own, strict=True)]
        add_penalty_gradient(rows.whole(targets), rows.whole(pieces), multiplier)
        updates = torch.bmm(split.unsqueeze(1), multiplier[rows.factor_of_slot]).squeeze(1)
        rows.add_split(dict(enumerate(targets)), updates)
    return grams, gradients


def assert_equals_whole(factors, ranks):
    # Small integers are exact in float32, whatever the order of a sum.
    multiplier = integers(len(factors), R, R, seed=1)
    grams, gradients = gram_and_gradient(factors, ranks, multiplier)
    for index, factor in enumerate(factors):
        assert torch.equal(grams[index], factor.T @ factor)
        assert torch.equal(gradients[index].view_as(factor), factor @ multiplier[index])


def factors_of(*rows):
    return [integers(n, R, seed=n) for n in rows]


def integers(*shape, seed):
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("offset", range(R + 1))
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_every_cut_modulo_r(count, offset):
    """Else the penalty is wrong at those numbers of ranks whose pieces end inside a row."""
    factors = factors_of(7, 4)
    ranks = zip(
        *(
            pieces_of(f.numel(), [min(f.numel(), offset + i * f.numel() // count) for i in range(1, count)])
            for f in factors
        ),
        strict=True,
    )
    assert_equals_whole(factors, list(ranks))


@pytest.mark.parametrize("first", range(1, R))
@pytest.mark.parametrize("second", range(1, R))
def test_one_row_between_three_ranks_and_a_piece_within_a_row(first, second):
    """Else a rank whose piece neither begins nor ends a row loses it."""
    low, high = sorted((first, second))
    (factor,) = factors_of(4)
    assert_equals_whole([factor], [[piece] for piece in pieces_of(factor.numel(), [R + low, R + high])])


def test_ranks_without_a_piece():
    """Else a rank that owns nothing of a factor breaks the others' sums."""
    (factor,) = factors_of(2)
    assert_equals_whole([factor], [[piece] for piece in pieces_of(factor.numel(), [0, 3, 3])])


def test_whole_rows_use_no_slot():
    """Else the all-reduced buffer grows with the model although nothing is split."""
    extents = [[(0, 10)], [(10, 10)]]
    assert FactorRows(extents[0], extents, R, CPU).slots == 0
