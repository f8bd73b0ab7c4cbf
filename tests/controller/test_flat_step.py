"""A step of the optimizer costs the same number of operations whatever the number of matrices."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from tests.dispatched import Counter, hooks_counted

SHAPES = ((16, 16), (16, 8), (16, 8), (16, 16), (16, 40), (16, 40), (40, 16))
"""(in, out) of a layer's seven matrices, as in a Llama: queries, keys, values, output, gate, up, down."""
STEPS = 12


@functools.cache
def counts(layers: int, preset: str):
    """What steps 2 … 12 of a model of 7 · layers matrices add: (normal, at an allocation, at the final allocation)."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(*shape, bias=False) for _ in range(layers) for shape in SHAPES])
    config = AdaLoraConfig(
        target_modules="all-linear", init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=3, preset=preset
    )
    inject_adalora(model, config)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    kinds = {}
    with hooks_counted() as counters:
        allocator = RankAllocator(model, config, total_step=STEPS).attach(optimizer)
        for step in range(1, STEPS + 1):
            for parameter in trained:
                parameter.grad = torch.randn_like(parameter)
            counters.append(Counter())
            optimizer.step()
            last = allocator.last_allocation
            if step > 1:  # the first has the optimizer's state to find
                kind = "normal" if last is None or last.step != step else "allocation"
                kind = "final" if kind == "allocation" and allocator.frozen else kind
                kinds.setdefault("frozen" if allocator.frozen and kind == "normal" else kind, []).append(counters[-1])
    return kinds


if __name__ == "__main__":
    for preset in ("default", "paper"):
        for layers in (4, 40, 80):
            print(preset, 7 * layers, {k: [(c.operations, c.kernels, c.reads) for c in v][-1] for k, v in counts(layers, preset).items()})
