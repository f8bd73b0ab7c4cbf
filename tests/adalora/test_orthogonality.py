"""The penalty's closed form against autograd in float64."""

import pytest
import torch

from adalora_scale.adalora.orthogonality import gradient_norm, penalty

R = 5
SHAPES = [(12, R), (7, R), (12, R), (5, R), (3, R), (40, R), (7, R), (12, R)]  # mixed, one with fewer rows than r
WEIGHT = 0.7


def factors_of(shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) * 0.4 for shape in shapes]


def by_autograd(factors, keep=None):
    leaves = [factor.double().requires_grad_() for factor in factors]
    total = torch.zeros((), dtype=torch.float64)
    for i, leaf in enumerate(leaves):
        columns = leaf if keep is None else leaf[:, keep[i]]
        deviation = columns.T @ columns - torch.eye(columns.shape[1], dtype=torch.float64)
        if deviation.numel() and deviation.abs().max() > 0:
            total = total + deviation.square().sum().sqrt()
    value = WEIGHT * total / len(leaves)
    return value, torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)


def closed_form(factors, keep=None):
    grams = torch.stack([factor.T @ factor for factor in factors])
    value, multiplier = penalty(grams, WEIGHT, keep)
    gradients = [factor @ matrix for factor, matrix in zip(factors, multiplier, strict=True)]
    return value, gradients, gradient_norm(grams, multiplier)


def assert_equal_in_norm(got, expected, tolerance=1e-6):
    for i, (g, e) in enumerate(zip(got, expected, strict=True)):
        assert (g.double() - e).norm() <= tolerance * e.norm(), i


def test_closed_form_equals_autograd():
    """A factor 2, a missing mean or a transposed Gram would change what orth_reg_weight means."""
    factors = factors_of()
    value, gradients, norm = closed_form(factors)
    expected_value, expected = by_autograd(factors)
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-6)
    assert_equal_in_norm(gradients, expected)
    assert norm.item() == pytest.approx(sum(e.square().sum() for e in expected).sqrt().item(), rel=1e-5)


def test_dropped_columns_count_neither_as_present_nor_as_missing():
    """A pruned, zeroed column would otherwise be pulled back to length one, or push the value up for ever."""
    generator = torch.Generator().manual_seed(3)
    keep = torch.rand(len(SHAPES), R, generator=generator) > 0.4
    keep[2], keep[5] = False, True
    factors = factors_of()
    value, gradients, norm = closed_form(factors, keep)
    expected_value, expected = by_autograd(factors, keep)
    assert value.item() == pytest.approx(expected_value.item(), rel=1e-6)
    assert_equal_in_norm(gradients, expected)
    assert norm.item() == pytest.approx(sum(e.square().sum() for e in expected).sqrt().item(), rel=1e-5)
    for gradient, row in zip(gradients, keep, strict=True):
        assert torch.equal(gradient[:, ~row], torch.zeros_like(gradient[:, ~row]))


def test_orthonormal_factor_has_zero_gradient():
    """The norm is not differentiable at zero: 0/0 would be NaN in every weight of the layer."""
    exact = torch.eye(12)[:, :R]
    factors = [exact, factors_of()[0]]
    _, gradients, norm = closed_form(factors)
    assert torch.equal(gradients[0], torch.zeros(12, R))
    assert gradients[1].abs().max() > 0
    assert torch.isfinite(norm)
    value, gradients, norm = closed_form([exact, exact.clone()])
    assert value == 0
    assert norm == 0
    assert all(torch.equal(g, torch.zeros(12, R)) for g in gradients)
