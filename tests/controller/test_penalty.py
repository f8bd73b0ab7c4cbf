"""Where the penalty's gradient goes: to adapters in training, after clipping; not to frozen ones."""

import pytest
import torch
import torch.nn.functional as F

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from tests.toy import Toy


def attached(optimizer, **changes):
    torch.manual_seed(0)
    options = {"init_r": 6, "target_r": 4, "tinit": 15, "tfinal": 4, "deltaT": 2, "orth_reg_weight": 0.3, **changes}
    config = AdaLoraConfig(**options)
    model = inject_adalora(Toy(), config)
    base = optimizer([p for p in model.parameters() if p.requires_grad])
    return model, base, RankAllocator(model, config, total_step=20).attach(base)


def train(model, optimizer, steps):
    for step in steps:
        ids = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(step))
        F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("preset", ["default", "paper", "peft"])
@pytest.mark.parametrize("factors", [("lora_A",), ("lora_A", "lora_E", "lora_B")], ids=len)
def test_a_frozen_adapter_keeps_weight_moments_and_statistics(factors, preset):
    """Else the penalty moves what the user froze after attach: 27 % in two steps."""
    model, optimizer, allocator = attached(lambda p: torch.optim.AdamW(p, lr=1e-2), preset=preset)
    train(model, optimizer, range(2))
    name, layer = list(adapter_layers(model))[1]
    for factor in factors:
        getattr(layer, factor).requires_grad_(False)
    spans = allocator.sharding.spans
    frozen = [i for i, span in enumerate(spans) if span.tensor.module == name and span.tensor.factor in factors]
    others = [i for i in range(len(spans)) if i not in frozen]

    def state(indices):
        moments = allocator.sharding.moments()
        looked_at = [i for i, span in enumerate(spans) if span.tensor.factor in allocator.score.factors]
        kinds = [dict(zip(looked_at, values, strict=True)) for values in allocator.statistics.values()]
        return [
            t.clone()
            for i in indices
            for t in (spans[i].weight, *(kind[i] for kind in kinds if i in kind), *moments[i])
        ]

    before, before_others = state(frozen), state(others)
    train(model, optimizer, range(2, 6))
    assert all(map(torch.equal, before, state(frozen)))
    assert not any(map(torch.equal, before_others, state(others)))
    assert all(getattr(layer, factor).grad is None for factor in factors)
    for factor in factors:  # the next stage
        getattr(layer, factor).requires_grad_(True)
    train(model, optimizer, range(6, 8))
    assert not any(map(torch.equal, before, state(frozen)))


def test_a_missing_gradient_of_a_trained_adapter_still_counts_as_zero():
    """Else a layer that a batch does not reach leaves the penalty, and runs differ by their batches' routes."""
    model, optimizer, _ = attached(lambda p: torch.optim.SGD(p, lr=1.0))
    before = [layer.lora_A.detach().clone() for _, layer in adapter_layers(model)]
    optimizer.step()
    assert not any(torch.equal(a, layer.lora_A) for a, (_, layer) in zip(before, adapter_layers(model), strict=True))


def test_clipping_does_not_reach_the_penalty():
    """As docs/config.md says: the loop clips before optimizer.step(), the penalty's gradient is added inside it."""
    model, optimizer, allocator = attached(lambda p: torch.optim.SGD(p, lr=1.0))
    ids = torch.randint(0, 32, (4, 8))
    model(ids).square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in trained]
    torch.nn.utils.clip_grad_norm_(trained, 1e-9)
    optimizer.step()
    moved = torch.stack([(p - old).square().sum() for p, old in zip(trained, before, strict=True)]).sum().sqrt().item()
    penalty = allocator.metrics()["adalora/orth_grad_norm"]
    assert penalty > 1e-3
    assert moved == pytest.approx(penalty, rel=1e-4)
