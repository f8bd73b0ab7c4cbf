"""A model with its experts' projections as layers computes what it did before."""

from __future__ import annotations

import pytest
import torch

from adalora_scale.experts.groups import by_expert
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import is_experts, projections, split_experts
from adalora_scale.experts.products import grouped_product, looped_product
from tests.experts.models import KINDS, VOCABULARY, experts_of, tiny


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_split_experts_compute_what_transformers_own_loop_does(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    if kind == "nemotron_h":  # its router works in float32, and its loop adds up in the router's dtype
        tolerance = max(tolerance, 1e-5)
    model = tiny(kind, dtype=dtype)
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    expected = model(inputs_embeds=embeddings).logits
    slope = torch.autograd.grad(expected.sum(), embeddings)[0]
    weights = {id(parameter) for parameter in model.parameters()}
    found = experts_of(model, is_experts)
    assert found
    for module in found.values():
        split_experts(module)
        split_experts(module)  # once more changes nothing
        assert all(isinstance(getattr(module, leaf), ExpertLinear) for leaf in projections(module))
    assert {id(parameter) for parameter in model.parameters()} == weights
    assert experts_of(model, is_experts).keys() == found.keys()
    actual = model(inputs_embeds=embeddings).logits
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    got = torch.autograd.grad(actual.sum(), embeddings)[0]
    torch.testing.assert_close(got, slope, rtol=10 * tolerance, atol=10 * tolerance)


def test_split_experts_of_no_gate_in_double_precision() -> None:
    module = next(iter(experts_of(tiny("nemotron_h"), is_experts).values()))
    torch.manual_seed(1)
    x, weights = torch.randn(9, 16, dtype=torch.float64), torch.rand(9, 2, dtype=torch.float64)
    index = torch.rand(9, 4).topk(2).indices
    expected = module(x, index, weights)
    split_experts(module)
    torch.testing.assert_close(module(x, index, weights), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("inside", "outside"), [(16, 24), (16, 6), (5, 3), (1, 1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_product_for_all_experts_is_a_product_for_each(inside: int, outside: int, transposed: bool) -> None:
    torch.manual_seed(0)
    index = torch.tensor([[0, 3], [3, 1], [0, 1], [4, 3]])  # nobody goes to 2
    groups, order = by_expert(index, 5)
    assert groups.ends.tolist() == [2, 4, 4, 7, 8]
    assert index.flatten()[order].tolist() == groups.expert_of_row.tolist()
    x = torch.randn(8, inside)
    weight = torch.randn(5, outside, inside).mT if transposed else torch.randn(5, inside, outside)
    slope = torch.randn(8, outside)
    results = []
    for product in (grouped_product, looped_product):
        a, b = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = product(a, b.mT.contiguous().mT if transposed else b, groups)
        results.append((y.detach(), *torch.autograd.grad(y, (a, b), slope.expand_as(y))))
    for fast, plain in zip(*results, strict=True):
        torch.testing.assert_close(fast, plain, rtol=1e-5, atol=1e-5)
    assert not results[0][2][2].any()  # the gradient of an expert without a token
    a, b = x.clone().requires_grad_(), weight.mT.clone().requires_grad_()
    y = grouped_product(a, b, groups, turned=True)
    turned = (y.detach(), *torch.autograd.grad(y, (a, b), slope))
    for own, plain in zip((turned[0], turned[1], turned[2].mT), results[1], strict=True):
        torch.testing.assert_close(own, plain, rtol=1e-5, atol=1e-5)


def test_no_row_at_all() -> None:
    groups, _ = by_expert(torch.empty(0, 2, dtype=torch.long), 3)
    x, weight = torch.randn(0, 4, requires_grad=True), torch.randn(3, 4, 8, requires_grad=True)
    y = grouped_product(x, weight, groups)
    assert y.shape == (0, 8)
    y.sum().backward()
    assert weight.grad is not None
    assert not weight.grad.any()
