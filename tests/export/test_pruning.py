"""Cutting updates to a number of parameters: what stays is what a dense SVD says, and never costs more than allowed."""

import random

import pytest
import torch

from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import Update
from adalora_scale.export.pruning import Size, cut_by_scores, cut_by_singular_values, singular_triplets


def random_updates(seed, *, lam=True):
    """A few matrices of different sizes and ranks, some of them with triplets that do nothing."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    updates = {}
    for index in range(rng.randint(1, 5)):
        r, rows_a, rows_b = rng.randint(0, 6), rng.randint(1, 12), rng.randint(1, 12)
        e = torch.randn(r, generator=generator) * 10 ** rng.uniform(-2, 1) if lam else torch.ones(r)
        e[: rng.randint(0, r)] *= rng.choice([0, 1])
        a, b = (torch.randn(shape, generator=generator) for shape in ((r, rows_a), (rows_b, r)))
        updates[f"m{index}"] = Update(a, e, b)
    return updates


def dense(update):
    return (update.b.double() * update.e.double()) @ update.a.double()


def sizes(updates, more):
    return {name: u.a.shape[1] + u.b.shape[0] + more for name, u in updates.items()}


def reference(updates, costs, budget):
    """The rule by plain loops over dense matrices: largest σ first, whatever does not fit is passed over."""
    parts = {name: torch.linalg.svd(dense(u), full_matrices=False) for name, u in updates.items()}
    found = [
        (-float(s), place, name, k)
        for place, (name, (_, values, _)) in enumerate(parts.items())
        for k, s in enumerate(values)
        if s > 1e-9
    ]
    kept = {name: torch.zeros_like(dense(u)) for name, u in updates.items()}
    left, out = budget, []
    for sigma, _, name, k in sorted(found):
        if costs[name] <= left:
            left -= costs[name]
            u, _, vt = parts[name]
            kept[name] -= sigma * torch.outer(u[:, k], vt[k])
        else:
            out.append(costs[name])
    return kept, budget - left, out


@pytest.mark.parametrize("more", [0, 1], ids=["lora", "adalora"])
def test_what_stays_is_the_truncation_of_the_dense_svd(more):
    """Else an adapter loses more than it must: the point of pruning by singular values."""
    cut_somewhere = 0
    for seed in range(150):
        updates = random_updates(seed)
        costs = sizes(updates, more)
        whole = sum(u.e.numel() * costs[name] for name, u in updates.items())
        budget = random.Random(seed).randint(0, whole)
        cuts = cut_by_singular_values(updates, costs, budget)
        expected, spent, left_out = reference(updates, costs, budget)
        for name, cut in cuts.items():
            torch.testing.assert_close(dense(cut.update), expected[name], rtol=1e-5, atol=1e-5)
            lost = (dense(updates[name]) - expected[name]).square().sum()
            torch.testing.assert_close(cut.dropped, float(lost), rtol=1e-5, atol=1e-9)
            torch.testing.assert_close(cut.whole, float(dense(updates[name]).square().sum()), rtol=1e-9, atol=1e-12)
            assert cut.update.e.ge(0).all() and cut.update.e.diff().le(0).all()
        used = sum(cut.update.e.numel() * costs[name] for name, cut in cuts.items())
        assert used == spent <= budget
        assert all(cost > budget - used for cost in left_out)
        cut_somewhere += bool(left_out)
    assert cut_somewhere > 50


def test_scores_decide_by_what_a_triplet_costs_and_the_error_is_that_of_the_sum():
    """Else `--by scores` is another rule than the run's, or its error assumes orthogonal triplets."""
    for seed in range(100):
        updates = random_updates(seed)
        costs = sizes(updates, 1)
        generator = torch.Generator().manual_seed(seed)
        scores = {name: torch.rand(u.e.numel(), generator=generator) for name, u in updates.items()}
        budget = random.Random(seed).randint(0, sum(u.e.numel() * costs[name] for name, u in updates.items()))
        cuts = cut_by_scores(updates, scores, costs, budget)
        worth = [(-float(s) / costs[name], name, k) for name in updates for k, s in enumerate(scores[name])]
        left, kept = budget, {name: [] for name in updates}
        for _, name, k in sorted(worth):
            if costs[name] <= left:
                left -= costs[name]
                kept[name].append(k)
        for name, cut in cuts.items():
            assert cut.places == sorted(kept[name])
            assert torch.equal(cut.update.a, updates[name].a[cut.places])
            lost = (dense(updates[name]) - dense(cut.update)).square().sum()
            torch.testing.assert_close(cut.dropped, float(lost), rtol=1e-6, atol=1e-9)


def test_triplets_that_cancel_are_not_kept():
    """Two triplets of one direction are one; a triplet without a λ is none: neither may take another's place."""
    a, b = torch.randn(1, 40), torch.randn(30, 1)
    update = Update(torch.cat([a, a, a]), torch.tensor([1.0, -0.4, 0.0]), torch.cat([b, b, b], 1))
    found = singular_triplets(update)
    assert found.e.numel() == 1
    torch.testing.assert_close(dense(found), dense(update))


@pytest.mark.parametrize(
    "text", ["0", "-5", "1.5", "many", "", "%", "0%", "101%", "-3%", "nan%", "inf%", "1/0%", "5 %%"]
)
def test_sizes_that_mean_nothing_are_refused(text):
    """Else a slip of the finger is an empty adapter."""
    with pytest.raises(UserError, match="--prune-to is "):
        Size(text)


@pytest.mark.parametrize(
    ("text", "number"), [("1000", 1000), ("1_000", 1000), ("50%", 500), ("100%", 1001), ("0.7%", 7), ("33.39%", 333)]
)
def test_shares_are_rounded_down(text, number):
    """Never above what was asked for; 0.7 % of 1000 is 7, whatever floats make of it."""
    assert Size(text).of(1001 if text == "100%" else 1000) == number
