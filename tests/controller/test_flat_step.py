"""A step costs the same few operations, and no memory between steps, whatever the number of matrices."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.controller.arena import Scratch, full_float32
from adalora_scale.engines.direct import DirectSharding
from adalora_scale.experts.linear import ExpertLinear
from benchmarks.pricing.counting import Counter, hooks_counted

SHAPES = ((16, 16), (16, 8), (16, 8), (16, 16), (16, 40), (16, 40), (40, 16))
"""(in, out) of a layer's seven matrices, as in a Llama: queries, keys, values, output, gate, up, down."""
STEPS = 12
LIMITS = {"default": 40, "paper": 120}
"""Operations that the hooks add to a step, views included."""
AT_AN_ALLOCATION = 300


def attached(layers: int, preset: str, experts: int = 0):
    """(parameters, optimizer, allocator) of a model of 7 · layers matrices that has no forward.

    With experts each layer has two projections of these more.
    """
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(*shape, bias=False) for _ in range(layers) for shape in SHAPES])
    for _ in range(layers if experts else 0):
        model.extend(ExpertLinear(nn.Parameter(torch.randn(experts, *sides))) for sides in ((24, 16), (16, 12)))
    config = AdaLoraConfig(
        target_modules="all-linear", init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=3, preset=preset
    )
    inject_adalora(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    return trained, optimizer, RankAllocator(model, config, total_step=STEPS).attach(optimizer)


def step(trained, optimizer):
    for parameter in trained:
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()


def counts(layers: int, preset: str, experts: int = 0):
    """What steps 2 … 12 dispatch: kind of step → counters. The first step has the optimizer's state to find."""
    kinds: dict[str, list[Counter]] = {}
    with hooks_counted() as counters:
        trained, optimizer, allocator = attached(layers, preset, experts)
        for number in range(1, STEPS + 1):
            counters.append(Counter())
            step(trained, optimizer)
            last = allocator.last_allocation
            allocated = last is not None and last.step == number
            kind = {(False, False): "normal", (True, False): "allocation", (True, True): "final"}
            if number > 1:
                kinds.setdefault(kind.get((allocated, allocator.frozen), "frozen"), []).append(counters[-1])
    assert set(kinds) == {"normal", "allocation", "final", "frozen"}
    return kinds


once = functools.cache(counts)


def too_many(kinds, preset):
    """Kinds of steps that break the promise."""
    limits = {"normal": LIMITS[preset], "frozen": LIMITS[preset]}
    return [
        (kind, counter.operations, counter.reads)
        for kind, counters in kinds.items()
        for counter in counters
        if counter.operations > limits.get(kind, AT_AN_ALLOCATION) or counter.reads > 1
    ]


@pytest.mark.parametrize("preset", LIMITS)
@pytest.mark.parametrize("layers", [40, pytest.param(80, marks=pytest.mark.full)])
def test_operations_do_not_grow_with_matrices(preset, layers):
    """Else a 70 B model pays tens of thousands of launches a step: 8,500 at 560 matrices before there was an arena."""
    few, many = once(4, preset), once(layers, preset)
    assert too_many(few, preset) == too_many(many, preset) == []
    for kind, counters in many.items():
        expected = max(counter.operations for counter in few[kind])
        assert max(counter.operations for counter in counters) <= 1.05 * expected, kind
        assert min(counter.operations for counter in counters) > 5


@pytest.mark.parametrize("preset", LIMITS)
def test_operations_do_not_grow_with_experts(preset):
    """Else a mixture of 128 experts a layer pays for each of them at every step."""
    few, many = once(2, preset, 8), once(2, preset, 128)
    for kind, counters in many.items():
        expected = max(counter.operations for counter in few[kind])
        assert 0.95 * expected <= max(counter.operations for counter in counters) <= 1.05 * expected, kind
        assert max(counter.reads for counter in counters) <= 1
        if kind in ("allocation", "final"):
            assert expected <= AT_AN_ALLOCATION


def test_a_loop_over_tensors_is_seen(monkeypatch):
    """Else the counts above hold whatever the hooks do: one view a gradient is enough to break them."""
    gradients = DirectSharding.gradients
    monkeypatch.setattr(
        DirectSharding, "gradients", lambda self, indices: [g.view(g.shape) for g in gradients(self, indices)]
    )
    kinds = counts(4, "default")
    assert {kind for kind, *_ in too_many(kinds, "default")} >= {"normal", "frozen"}


def test_missing_gradients_are_made_in_one_operation():
    """Else a tower that a batch does not reach costs two operations a tensor."""
    with hooks_counted() as counters:
        trained, optimizer, _ = attached(4, "default")
        counters.append(Counter())
        optimizer.step()
        assert all(not p.grad.any() and p.grad.shape == p.shape for p in trained)
        assert len({p.grad.data_ptr() for p in trained}) == len(trained)
        assert counters[-1].operations <= LIMITS["default"]


@pytest.mark.parametrize("preset", LIMITS)
def test_the_arena_has_no_memory_between_steps_and_the_default_only_that_of_lambda(preset, monkeypatch):
    """Else a copy of the adapter, or of its gradients, is held for nothing."""
    opened = []
    original = Scratch.open
    monkeypatch.setattr(Scratch, "open", lambda self, size: (opened.append(size), original(self, size))[1])
    trained, optimizer, allocator = attached(2, preset)
    arena = allocator._attached().arena
    lambdas = sum(p.numel() for p in trained if p.dim() == 1)
    for number in range(1, STEPS + 1):
        opened.clear()
        step(trained, optimizer)
        assert arena.weights.flat.untyped_storage().nbytes() == arena.work.flat.untyped_storage().nbytes() == 0
        if preset == "default" and number != allocator.schedule.final_step:  # where columns and moments are zeroed
            assert max(opened, default=0) <= lambdas < arena.size
    assert allocator.frozen


def test_products_are_full_float32_whatever_is_allowed(monkeypatch):
    """Else the penalty has 10 bits of mantissa on a GPU where TF32 is on for the model."""
    seen = []
    bmm = torch.bmm

    def watched(*args, **kwargs):
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return bmm(*args, **kwargs)

    monkeypatch.setattr(torch, "bmm", watched)
    before = torch.get_float32_matmul_precision()
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        trained, optimizer, _ = attached(1, "paper")
        step(trained, optimizer)
        assert len(seen) > 4 and set(seen) == {"ieee"}
        assert torch.backends.cuda.matmul.allow_tf32
        with pytest.raises(ValueError), full_float32():
            raise ValueError
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.get_float32_matmul_precision() == before
