"""Scores by name, and their statistics against plain loops."""

import pytest
import torch

from adalora_scale.adalora.layer import FACTORS
from adalora_scale.adalora.score import Score, ScoredPiece
from adalora_scale.adalora.scores import score_named
from adalora_scale.config import SCORES, AdaLoraConfig
from adalora_scale.errors import UserError
from adalora_scale.verify.reference import SCORES as REFERENCE_SCORES

BETAS = (0.85, 0.6)
CONFIG = AdaLoraConfig(beta1=BETAS[0], beta2=BETAS[1])


def tensors(seed, sizes=(6, 1, 0, 13)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for n in sizes]


def pieces_of(score, sizes=(6, 1, 0, 13), rows=4, factor="lora_A"):
    return [ScoredPiece(factor, rows, {name: torch.zeros(n) for name in score.statistics}) for n in sizes]


def test_every_file_is_a_score_and_has_a_reference():
    """Else a name in the config has nothing behind it, or nothing that it is compared with."""
    assert {"sensitivity_uncertainty", "paper", "peft"} <= set(SCORES)
    assert set(REFERENCE_SCORES) == set(SCORES)
    scores = [score_named(name) for name in SCORES]
    assert all(issubclass(score, Score) for score in scores)
    assert len(set(scores)) == len(SCORES)
    for score in scores:
        assert set(score.factors) <= set(FACTORS)
        assert score.factors


@pytest.mark.parametrize("make", [score_named, lambda name: AdaLoraConfig(score=name)], ids=["registry", "config"])
def test_unknown_name_suggests_the_nearest(make):
    """Else a misspelt score trains with no importance at all, or a later version's checkpoint ends in a traceback."""
    with pytest.raises(UserError, match=r"adalora\.score is 'papper'.*Did you mean 'paper'"):
        make("papper")
    with pytest.raises(UserError, match=r"Known: magnitude, paper, peft"):
        make("../layer")


def test_ten_updates_equal_a_loop():
    """Ū must use the new Ī and its own beta; the old Ī or beta1 twice look just as plausible."""
    score = score_named("sensitivity_uncertainty")(CONFIG)
    pieces = pieces_of(score)
    expected = [([0.0] * t.numel(), [0.0] * t.numel()) for t in tensors(0)]
    for step in range(10):
        weights, gradients = tensors(step), tensors(100 + step)
        kept, given = [w.clone() for w in weights], [g.clone() for g in gradients]
        score.observe(pieces, weights, given, 1.0)
        assert all(map(torch.equal, kept, weights))
        for (mean, spread), w, g in zip(expected, weights, gradients, strict=True):
            for i in range(len(mean)):
                now = abs(w[i].item() * g[i].item())
                mean[i] = BETAS[0] * mean[i] + (1 - BETAS[0]) * now
                spread[i] = BETAS[1] * spread[i] + (1 - BETAS[1]) * abs(now - mean[i])
    for (mean, spread), piece in zip(expected, pieces, strict=True):
        torch.testing.assert_close(piece.statistics["sensitivity"], torch.tensor(mean), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(piece.statistics["uncertainty"], torch.tensor(spread), rtol=1e-5, atol=1e-7)
    # 4 rows: the mean over rows is a quarter of the sum
    for (mean, spread), value in zip(expected, score.contributions(pieces, tensors(0)), strict=True):
        product = torch.tensor(mean) * torch.tensor(spread) / 4
        torch.testing.assert_close(value, product, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", sorted(set(SCORES) - {"magnitude"}))  # which remembers nothing
@pytest.mark.parametrize("scale", [65536.0, torch.tensor(65536.0)], ids=["number", "tensor"])
def test_scale_of_the_gradients_is_divided_out(name, scale):
    """A GradScaler changes its scale during the run; importance must not follow it."""
    runs = []
    for factor in (1.0, scale):
        score = score_named(name)(CONFIG)
        pieces = pieces_of(score)
        score.observe(pieces, tensors(0), [g * factor for g in tensors(1)], factor)
        runs.append([value for piece in pieces for value in piece.statistics.values()])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))  # a power of two divides exactly
    assert any(t.abs().sum() > 0 for t in runs[0])
