"""A model with its experts' projections as layers computes what it did before."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.experts.groups import Groups, by_expert
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import (
    is_experts,
    join_all_experts,
    projections,
    split_all_experts,
    split_experts,
)
from adalora_scale.experts.products import grouped_product
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


def looped_product(x: torch.Tensor, weight: torch.Tensor, groups: Groups) -> torch.Tensor:
    """Row by row, the plain way."""
    return torch.stack([row @ weight[expert] for row, expert in zip(x, groups.expert_of_row.tolist(), strict=True)])


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


@pytest.mark.parametrize(("dtype", "r"), [(torch.float32, 3), (torch.bfloat16, 12), (torch.float64, 3)])
def test_the_operator_gives_what_it_promises_a_compiler(dtype: torch.dtype, r: int) -> None:
    """Else compiled code reads a padded result by the strides of one that is not: pruned ranks are seldom aligned."""
    groups, _ = by_expert(torch.tensor([[0, 3], [3, 1]]), 5)
    x = torch.randn(4, 16, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 16, r, dtype=dtype, requires_grad=True)
    for turned, right in ((False, weight), (True, weight.detach().mT.contiguous().requires_grad_())):
        arguments = (x, right, groups.ends, False, turned)
        tests = ("test_schema", "test_autograd_registration", "test_faketensor")
        torch.library.opcheck(torch.ops.adalora_scale.grouped_product.default, arguments, test_utils=tests)
        assert torch.ops.adalora_scale.grouped_product(*arguments).is_contiguous()
    dy = torch.randn(4, r, dtype=dtype)
    assert torch.ops.adalora_scale.grouped_outer(x.detach(), dy, groups.ends, False).is_contiguous()


def test_no_token_at_all() -> None:
    module = next(iter(experts_of(tiny("mixtral"), is_experts).values()))
    split_experts(module)
    nothing = torch.empty(0, 2, dtype=torch.float64)
    assert module(torch.empty(0, 16, dtype=torch.float64), nothing.long(), nothing).shape == (0, 16)


def test_a_split_model_is_pickled_and_copied() -> None:
    model = tiny("gpt_oss")
    split_all_experts(model)
    ids = torch.arange(3, 9)[None]
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        assert torch.equal(other(ids).logits, model(ids).logits)
        join_all_experts(other)
        assert {type(m) for m in other.modules()} == {type(m) for m in tiny("gpt_oss").modules()}


def test_a_mixture_of_one_is_refused_by_name() -> None:
    """Its matrix would have the layer's own name, which no checkpoint has."""
    model = tiny("mixtral", num_local_experts=1, num_experts_per_tok=1)
    with pytest.raises(UserError, match=r"gate_up_proj.*one expert alone"):
        inject_adalora(model, AdaLoraConfig(init_r=2, target_r=1))


def test_an_implementation_chosen_later_is_refused() -> None:
    """Else it is ignored, or adapters are."""
    model = tiny("mixtral")
    split_all_experts(model)
    model.set_experts_implementation("batched_mm")
    with pytest.raises(Unsupported, match="batched_mm"):
        model(torch.arange(3, 9)[None])
