"""Exactly the budget is kept, the best are kept, and ties have one answer."""

import math
import random

import pytest
import torch

from adalora_scale.adalora.allocation import keep_best, mask_digest, relative_gap


def kept_by_loop(scores, budget):
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
    return [i in set(order[:budget]) for i in range(len(scores))]


def test_random_scores_with_many_ties():
    """Whatever the scores, exactly `budget` stay and no dropped one beats a kept one; earlier position wins a tie."""
    rng = random.Random(0)
    for _ in range(400):
        n = rng.randint(1, 60)
        levels = rng.choice([1, 2, 5, 10**6])
        scores = [rng.randrange(levels) / levels for _ in range(n)]
        for budget in {0, n, rng.randint(0, n)}:
            mask = keep_best(torch.tensor(scores), budget)
            assert mask.dtype == torch.bool
            assert mask.tolist() == kept_by_loop(scores, budget)
            assert int(mask.sum()) == budget


def test_all_scores_equal():
    """PEFT's threshold drops all of a tie: at zero scores (fp16 underflow) the whole adapter."""
    assert keep_best(torch.zeros(6), 4).tolist() == [True] * 4 + [False] * 2


def test_tiny_and_huge_scores_are_told_apart():
    """Scores are products of small EMAs, far below float16's range and near float32's end."""
    scores = torch.tensor([1e-38, 2e-38, 1e-44, 0.0, 3e38])
    assert keep_best(scores, 3).tolist() == [True, True, False, False, True]
    assert keep_best(scores, 4).tolist() == [True, True, True, False, True]


def test_nan_scores_still_give_exactly_the_budget():
    """Ranks must not part or crash over a NaN: it counts as largest, by position."""
    scores = torch.tensor([1.0, math.nan, 3.0, math.nan, 2.0])
    assert keep_best(scores, 1).tolist() == [False, True, False, False, False]
    assert keep_best(scores, 3).tolist() == [False, True, True, True, False]
    assert int(keep_best(torch.full((8,), math.nan), 5).sum()) == 5


def spent_by_loop(scores, costs, budget):
    kept = set()
    for i in sorted(range(len(scores)), key=lambda i: (-scores[i] / costs[i], i)):
        if costs[i] <= budget:
            budget -= costs[i]
            kept.add(i)
    return [i in kept for i in range(len(scores))]


def test_triplets_that_cost_differently_are_taken_by_score_per_cost():
    """Else the adapter ends with other parameters than asked, or wide matrices are free."""
    rng = random.Random(1)
    for _ in range(400):
        n = rng.randint(1, 60)
        levels = rng.choice([1, 2, 5, 64])
        costs = [rng.choice([1, 16, 48, 129]) for _ in range(n)]
        scores = [float(rng.randrange(levels) * cost) for cost in costs]  # many ties of score per cost
        for budget in {0, sum(costs), rng.randint(0, sum(costs))}:
            mask = keep_best(torch.tensor(scores), budget, torch.tensor(costs)).tolist()
            assert mask == spent_by_loop(scores, costs, budget)
            spent = sum(cost for cost, kept in zip(costs, mask, strict=True) if kept)
            left_out = [cost for cost, kept in zip(costs, mask, strict=True) if not kept]
            assert spent <= budget < spent + min(left_out, default=math.inf)


def test_one_cost_for_all_is_a_number_of_triplets():
    """Else a model of equal matrices prunes otherwise in one unit than in the other."""
    scores = torch.rand(50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keep_best(scores, 7 * 20 + 6, torch.full((50,), 7)), keep_best(scores, 20))


def test_relative_gap():
    """The printed distance from a tie decides whether a differing mask is a bug."""
    scores = torch.tensor([4.0, 1.0, 3.0, 2.0])
    assert relative_gap(scores, 2) == pytest.approx((3 - 2) / 3)
    assert relative_gap(scores, 1) == pytest.approx((4 - 3) / 4)
    assert relative_gap(scores, 0) == relative_gap(scores, 4) == 1.0
    assert relative_gap(torch.tensor([2.0, 2.0, 1.0]), 1) == 0.0
    assert relative_gap(torch.zeros(3), 1) == 0.0
    costs = torch.tensor([8, 1, 2, 1])  # per cost 0.5, 1, 1.5, 2
    assert relative_gap(scores, 3, costs) == pytest.approx((1.5 - 1) / 1.5)
    assert relative_gap(scores, 12, costs) == 1.0


def test_digest_differs_between_masks():
    """Equal digests are how ranks and runs are said to agree."""
    masks = [torch.tensor([bool(code >> i & 1) for i in range(10)]) for code in range(1024)]
    digests = {mask_digest(mask) for mask in masks}
    assert len(digests) == 1024
    assert mask_digest(masks[77]) == mask_digest(masks[77].clone())
    assert all(len(digest) == 16 and int(digest, 16) >= 0 for digest in digests)
    assert mask_digest(torch.ones(4, dtype=torch.bool)) != mask_digest(torch.ones(5, dtype=torch.bool))
