"""Ī, Ū and column sums against plain loops."""

import itertools

import pytest
import torch

from adalora_scale.adalora.importance import add_column_sums, update_importance

BETAS = (0.85, 0.6)


def tensors(seed, sizes=(6, 1, 0, 13)):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, generator=generator) for n in sizes]


def test_ten_updates_equal_a_loop():
    """Ū must use the new Ī and its own beta; the old Ī or beta1 twice look just as plausible."""
    sensitivity = [torch.zeros_like(t) for t in tensors(0)]
    uncertainty = [torch.zeros_like(t) for t in tensors(0)]
    expected = [([0.0] * t.numel(), [0.0] * t.numel()) for t in sensitivity]
    for step in range(10):
        weights, gradients = tensors(step), tensors(100 + step)
        kept = [g.clone() for g in gradients], [w.clone() for w in weights]
        update_importance(sensitivity, uncertainty, weights, gradients, beta1=BETAS[0], beta2=BETAS[1])
        assert all(torch.equal(a, b) for a, b in zip(kept[0] + kept[1], gradients + weights, strict=True))
        for (mean, spread), w, g in zip(expected, weights, gradients, strict=True):
            for i in range(len(mean)):
                now = abs(w[i].item() * g[i].item())
                mean[i] = BETAS[0] * mean[i] + (1 - BETAS[0]) * now
                spread[i] = BETAS[1] * spread[i] + (1 - BETAS[1]) * abs(now - mean[i])
    for (mean, spread), s, u in zip(expected, sensitivity, uncertainty, strict=True):
        torch.testing.assert_close(s, torch.tensor(mean), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(u, torch.tensor(spread), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("scale", [65536.0, torch.tensor(65536.0)])
def test_scale_of_the_gradients_is_divided_out(scale):
    """A GradScaler changes its scale during the run; importance must not follow it."""
    runs = []
    for factor in (1.0, scale):
        sensitivity = [torch.zeros_like(t) for t in tensors(0)]
        uncertainty = [torch.zeros_like(t) for t in tensors(0)]
        gradients = [g * factor for g in tensors(1)]
        update_importance(sensitivity, uncertainty, tensors(0), gradients, beta1=0.85, beta2=0.85, grad_scale=factor)
        runs.append(sensitivity + uncertainty)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))  # a power of two divides exactly
    assert any(t.abs().sum() > 0 for t in runs[0])


def test_no_tensors_is_no_error():
    """A rank may own no piece of any adapter."""
    update_importance([], [], [], [], beta1=0.85, beta2=0.85)


@pytest.mark.parametrize("r", [1, 2, 3, 7, 8])
def test_column_sums_of_every_piece_equal_a_loop(r):
    """ZeRO's flat pieces begin and end inside rows; one wrong offset shifts every triplet's score by one."""
    whole = torch.arange(1.0, 6 * r + 1)
    for start in range(2 * r + 1):
        for length in range(len(whole) - start + 1):
            out = torch.full((r,), 100.0)
            add_column_sums(out, whole[start : start + length], start=start)
            expected = [100.0] * r
            for i in range(start, start + length):
                expected[i % r] += whole[i].item()
            assert out.tolist() == expected, (start, length)


def test_column_sums_of_pieces_add_up_to_the_whole():
    """The sum over ranks must be one process's sum."""
    values = torch.randn(11 * 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for cuts in ([0, 44], [0, 0, 5, 6, 6, 23, 44], [0, 1, 2, 3, 44], [0, 43, 44]):
        out = torch.zeros(4, dtype=torch.float64)
        for start, end in itertools.pairwise(cuts):
            add_column_sums(out, values[start:end], start=start)
        torch.testing.assert_close(out, values.view(11, 4).sum(0))
