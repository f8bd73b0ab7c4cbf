"""Whole AdaLoRA runs over every kind of experts and routers, against a plain loop over experts in float64.

The reference (`verify/reference.py`) merges each expert's update into its matrix and runs the family's own forward,
its own loop over experts; ours runs split experts, grouped products, the arena, the allocator and AdamW. Routing is
the same in both because no token comes near a tie (`verify/mixture.py`), which is measured and asserted first.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from adalora_scale.adalora.adaptables.experts import ExpertProjection
from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.cli import _parser as build_parser
from adalora_scale.engines import pieces, replicated
from adalora_scale.experts import products
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import Repeated, Routed
from adalora_scale.experts.routers import routers
from adalora_scale.verify.command import Request
from adalora_scale.verify.engines import SINGLE, Outcome, train
from adalora_scale.verify.float64 import Float64
from adalora_scale.verify.margins import LEAST, Margins
from adalora_scale.verify.matrix import ALL_TOLERANCE, TENSOR_TOLERANCE, distances, expected_outcome, judge
from adalora_scale.verify.mixture import KINDS, mixture
from adalora_scale.verify.problem import Problem

STEPS, FINAL = 24, 18
EXACT = 1e-10
"""Largest ‖w − w_ref‖ / ‖w_ref‖ in float64, of all adapters together and of each tensor."""
DAILY = {("gpt_oss", "paper", "params"), ("deepseek_v3", "default", "params")}
_USUAL = [("default", "params"), ("paper", "triplets")]
_EVERY = [*_USUAL, ("default", "triplets"), ("paper", "params")]
CASES = [
    pytest.param(kind, *how, marks=[] if (kind, *how) in DAILY else pytest.mark.full, id="-".join((kind, *how)))
    for kind in KINDS
    for how in (_EVERY if kind in {case[0] for case in DAILY} else _USUAL)
]


def problem_of(kind, preset, unit):
    return Problem(
        model=None, experts=kind, device=torch.device("cpu"), ranks=1, steps=STEPS, preset=preset,
        options={"budget_unit": unit},
    )  # fmt: skip


@functools.cache
def expected(kind, preset, unit):
    return expected_outcome("plain", problem_of(kind, preset, unit))


def trained(problem, model):
    """The outcome of a run of this model, and its margins."""
    with mock.patch.object(Problem, "adapted_model", lambda self, dtype: model), Margins(model) as margins:
        return train(SINGLE, "plain", problem), margins


@contextlib.contextmanager
def in_float64():
    """Our code and the model's with every float32 that they ask torch for made float64.

    Those are the arena, the score's statistics, the sums of a step, masks as numbers, and a family's own float32 parts.
    Two places compare a dtype with float32, to refuse what is no master weight: they compare with float64.
    """
    wide = SimpleNamespace(**vars(torch) | {"float32": torch.float64})
    with Float64(), mock.patch.object(replicated, "torch", wide), mock.patch.object(pieces, "torch", wide):
        yield


@contextlib.contextmanager
def counted(module, name):
    calls, original = [], getattr(module, name)

    def call(*args):
        calls.append(1)
        return original(*args)

    with mock.patch.object(module, name, call):
        yield calls


def assert_far_from_ties(margins, outcome, kind):
    assert margins.smallest > LEAST, f"a tie: {margins.smallest:.1e} between a chosen expert and another; not a fault"
    assert outcome.margin > LEAST, f"a tie in the reference: {outcome.margin:.1e}; not a fault"
    assert margins.reached and max(margins.reached) < experts_in(kind) - 1  # one expert at least sees no token


def experts_in(kind):
    return max(layer.matrices for _, layer in adapter_layers(problem_of(kind, "default", "params").adapted_model()))


@pytest.mark.parametrize(("kind", "preset", "unit"), CASES)
def test_a_whole_run_equals_a_plain_loop_over_experts(kind, preset, unit):
    """Else a kind is trained as something else: warm-up, 16 allocations, the final mask, the frozen phase."""
    problem, reference = problem_of(kind, preset, unit), expected(kind, preset, unit)
    model = problem.adapted_model()
    wide = problem.adapted_model().double()  # of the same first values
    with counted(products, "_rows_by_matrices") as calls:
        single, margins = trained(problem, model)
    assert len(calls) > 100  # of the kernel: experts were not computed one by one
    assert_far_from_ties(margins, reference, kind)
    assert single.masks == reference.masks and len(single.masks) >= 10 and FINAL in single.masks
    together, worst, name = distances(single.weights, reference.weights)
    assert together <= ALL_TOLERANCE and worst <= TENSOR_TOLERANCE, (together, worst, name)
    with in_float64():
        exact, margins = trained(problem, wide)
    assert {w.dtype for own in exact.weights.values() for w in own.values()} == {torch.float64}
    assert_far_from_ties(margins, reference, kind)
    assert exact.masks == reference.masks
    together, worst, name = distances(exact.weights, reference.weights)
    assert together <= EXACT and worst <= EXACT, (together, worst, name)
    # What would make all of the above easy is that experts are pruned alike.
    last = {name: torch.tensor(mask).view(layer.matrices, -1).sum(1) for (name, layer), mask in
            zip(adapter_layers(model), single.masks[FINAL].values(), strict=True)}  # fmt: skip
    ranks = torch.cat([last[name] for name, layer in adapter_layers(model) if layer.matrices > 1])
    assert len(ranks.unique()) > 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixture_is_what_its_family_is(kind):
    """Else a case passes because the hard part of a family is not there: its layout, its biases, its other experts."""
    model = mixture(kind)
    split = problem_of(kind, "default", "params").adapted_model()
    experts = [m for m in split.modules() if isinstance(m, Routed | Repeated)]
    bases = [m for m in split.modules() if isinstance(m, ExpertLinear)]
    assert len(bases) == 2 * len(experts) and len(routers(model)) == len(experts)
    names = dict(split.named_modules())
    has = {
        "transposed": all(base.transposed for base in bases),
        "biased": all(base.bias is not None and base.bias.detach().any() for base in bases),
        "repeated": all(isinstance(m, Repeated) for m in experts),
        "interleaved": not getattr(experts[0], "is_concatenated", True),
        "shared": any(name.endswith(("shared_experts.up_proj", "shared_expert.up_proj")) for name in names),
        "dense layer": len(experts) < 2,
        "bias of choice": any(getattr(names[name], "e_score_correction_bias", None) is not None for name in names),
    }
    assert {key for key, there in has.items() if there} == {
        "gpt_oss": {"transposed", "biased", "interleaved"},
        "deepseek_v3": {"shared", "dense layer", "bias of choice"},
        "llama4_text": {"transposed", "repeated", "shared"},
    }.get(kind, set())


def swapped_halves(y):
    return torch.cat(y.chunk(2, dim=-1)[::-1], dim=-1)


def laid_apart(y):
    """What is interleaved, as if it were two halves."""
    return torch.cat([y[..., ::2], y[..., 1::2]], dim=-1)


def mutant(change):
    """ExpertProjection with what its adapters add changed; `change(update, base, groups)`."""
    original = ExpertProjection.add_update

    def add_update(self, base, y, x, a, e, b, dropout, *more):
        return y + change(original(self, base, torch.zeros_like(y), x, a, e, b, dropout, *more), base, *more)

    return mock.patch.object(ExpertProjection, "add_update", add_update)


def one_expert_off(y, base, groups):
    return y * torch.where(groups.expert_of_row == 1, 1.001, 1.0).to(y).unsqueeze(1)


MUTANTS = {
    "gate and up swapped": ("deepseek_v3", lambda y, base, groups: swapped_halves(y) if "up" in wide(base) else y),
    "not interleaved": ("gpt_oss", lambda y, base, groups: laid_apart(y) if "up" in wide(base) else y),
    "one expert's scale 0.1 % off": ("gpt_oss", one_expert_off),
}


def wide(base):
    return "gate_up" if base.out_features > base.in_features else "down"


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_the_adapters_of_experts_is_refused(name):
    """Else the comparison passes whatever an expert's adapter computes; the base is left right."""
    kind, change = MUTANTS[name]
    case = next(case for case in DAILY if case[0] == kind)
    problem, reference = problem_of(*case), expected(*case)
    with mutant(change):
        outcome, margins = trained(problem, problem.adapted_model())
    assert_far_from_ties(margins, reference, kind)
    together, worst, _ = distances(outcome.weights, reference.weights)
    assert outcome.masks != reference.masks or together > ALL_TOLERANCE or worst > TENSOR_TOLERANCE


def test_margins_see_every_choice():
    """Else a tie goes unseen: in groups, in a mask, in the first of two picks."""

    class Router(torch.nn.Module):
        def forward(self, logits):
            groups = logits.view(-1, 2, 2).topk(1, dim=-1)[0].squeeze(-1)
            best = torch.topk(groups, k=1, dim=-1)[1]
            chosen = logits.view(-1, 2, 2).gather(1, best.view(-1, 1, 1).expand(-1, 1, 2)).squeeze(1)
            return chosen.max(dim=-1, keepdim=True)

    def margin(*logits):
        model = torch.nn.ModuleDict({"router": Router()})
        with Margins(model) as margins:
            model["router"](torch.tensor([logits]))
            torch.tensor([1.0, 1.0]).topk(1)  # outside a router
        return margins.smallest

    assert margin(4.0, 2.0, 1.0, 0.5) == 0.5
    assert margin(4.0, 2.0, 3.0, 1.0) == 0.25  # between groups
    assert margin(4.0, 2.0, -2.0, -2.1) == pytest.approx(0.1 / 2.1)  # in a group that is left out: counted too
    assert margin(4.0, 4.0, 1.0, 0.0) == 0
    assert margin(4.0, float("-inf"), 1.0, 0.0) == 0.75  # what is masked out is no candidate


def test_a_tie_is_named_by_the_verdict_of_verify_engines():
    """Else whoever sees a cell fail looks for a fault in an engine."""
    outcome = Outcome(masks={step: {"a": [True]} for step in range(10)}, weights={"a": {"A": torch.ones(2, 1)}})
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        assert judge("ddp", "plain", outcome, outcome).verdict == "pass"
        cell = judge("ddp", "plain", outcome, dataclasses.replace(outcome, margin=1e-7))
    finally:
        torch.distributed.destroy_process_group()
    assert cell.verdict == "fail" and "1.0e-07 of a tie between experts" in cell.reason


def test_every_kind_reaches_the_ranks_of_verify_engines():
    """Else the option is lost between the process that starts ranks and the ranks."""
    asked = build_parser().parse_args(["verify-engines", *Request(experts="gpt_oss").arguments()])
    assert (
        asked.experts == "gpt_oss" and build_parser().parse_args(["verify-engines", "--experts"]).experts == "mixtral"
    )
    assert build_parser().parse_args(["verify-engines", *Request().arguments()]).experts is None


def test_float64_is_what_is_told_and_no_more():
    """Else the exact runs have a float32's digits in a norm, a softmax or a statistic."""
    x = torch.full((3,), 1 / 3, dtype=torch.float64, requires_grad=True)
    with Float64():
        assert x.float().dtype == x.to(torch.float32).dtype == x.type(torch.float32).dtype == torch.float64
        assert torch.softmax(x, 0, dtype=torch.float).dtype == torch.empty(1, dtype=torch.float32).dtype == x.dtype
        assert x.to(torch.bfloat16).dtype == torch.bfloat16
        (slope,) = torch.autograd.grad(x.float().square().sum(), x)
    assert slope.equal(2 * x.detach()) and x.float().dtype == torch.float32
