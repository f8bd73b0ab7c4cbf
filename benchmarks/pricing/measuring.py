"""One table of `price.py`: every method counted alone, then timed step by step beside the others."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import nn

from benchmarks.pricing.counting import count, kernels, peak_bytes
from benchmarks.pricing.methods import (
    EARLY,
    Method,
    base_alone,
    base_model,
    ours,
    ours_resumed,
    peft_adalora,
    plain_lora,
)
from benchmarks.pricing.shapes import SHAPES

LORA, LAYERS, OURS, PAPER, THEIRS = "LoRA (PEFT)", "ours, no allocator", "ours", "ours, paper", "AdaLoRA (PEFT)"
BASE = "the base alone"
HALF, PRUNED, RESUMED, THEIRS_PRUNED = "LoRA (PEFT), half", "ours, pruned", "ours, resumed", "AdaLoRA (PEFT), pruned"
RATIOS = (
    (OURS, LAYERS), (PAPER, LAYERS), (OURS, LORA), (PAPER, LORA), (THEIRS, OURS), (THEIRS, PAPER), (THEIRS, LORA),
    (PRUNED, LORA), (RESUMED, LORA), (RESUMED, HALF), (THEIRS_PRUNED, LORA),
    (LORA, BASE), (OURS, BASE), (THEIRS, BASE),
)  # fmt: skip
DELTA_T = 10
"""Steps between allocations, everywhere."""


def table(name: str, base: str, dtype: torch.dtype, device: str, rounds: int) -> dict[str, Any]:
    """Measure every method at one of `SHAPES` over one kind of base ("16bit", "4bit"), `rounds` timed steps each."""
    shape = SHAPES[name]
    mine = base_model(shape, dtype, device, base)
    theirs = mine if base == "16bit" else base_model(shape, dtype, device, "4bit-bnb")
    builders: dict[str, Callable[[], Method]] = {
        BASE: partial(base_alone, mine, shape, device),
        LORA: partial(plain_lora, theirs, shape, device, shape.r),
        HALF: partial(plain_lora, theirs, shape, device, shape.r // 2),
        LAYERS: partial(ours, mine, shape, device, allocator=False),
        OURS: partial(ours, mine, shape, device),
        PAPER: partial(ours, mine, shape, device, preset="paper"),
        PRUNED: partial(ours, mine, shape, device, pruned=True),
        RESUMED: partial(ours_resumed, mine, shape, device),
        THEIRS: partial(peft_adalora, theirs, shape, device, pruned=False),
        THEIRS_PRUNED: partial(peft_adalora, theirs, shape, device, pruned=True),
    }
    held = _bytes(mine) + (0 if theirs is mine else _bytes(theirs))
    figures: dict[str, dict[str, Any]] = {method: _alone(build, held, device) for method, build in builders.items()}
    methods = {method: _ready(build()) for method, build in builders.items()}
    steps, updates = _interleaved(methods, rounds)
    for method, values in figures.items():
        values["step_seconds"], values["update_seconds"] = steps[method], updates[method]
    return {
        "shape": name,
        "base": base,
        "matrices": shape.matrices,
        "tokens": shape.tokens,
        "initial_rank": shape.r,
        "methods": figures,
        "ratios": {f"{a} / {b}": _ratio(steps[a], steps[b]) for a, b in RATIOS},
        "update_ratios": {f"{a} / {b}": _ratio(updates[a], updates[b]) for a, b in RATIOS},
    }


def _ready(method: Method) -> Method:
    """Make the optimizer's state, and pass the final allocation where it comes early."""
    while method.done < EARLY:
        method.step()
    return method


def _alone(build: Callable[[], Method], held: int, device: str) -> dict[str, Any]:
    """Count in the steps up to the first allocation, with nothing else in memory but the bases' `held` bytes."""
    gc.collect()
    method = _ready(build())
    figures: dict[str, Any] = {"trained_parameters": method.parameters}
    figures["peak_bytes"] = peak_bytes(method.step, device) - held
    figures["step"] = count(method.step)
    if device == "cuda":
        figures["kernels"] = kernels(method.step)
    while method.done + 1 < DELTA_T:
        method.step()
    figures["step_with_allocation"] = count(method.step)
    return figures


def _interleaved(methods: dict[str, Method], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    steps: dict[str, list[float]] = {name: [] for name in methods}
    updates: dict[str, list[float]] = {name: [] for name in methods}
    order, names = random.Random(0), list(methods)
    for _ in range(rounds):
        order.shuffle(names)  # nobody always finds the memory as the same other left it
        for name in names:
            whole, second = methods[name].timed()
            steps[name].append(whole)
            updates[name].append(second)
    return steps, updates


def _ratio(one: list[float], other: list[float]) -> dict[str, float]:
    pairs = np.array(one) / np.array(other)
    interval = bootstrap((pairs,), np.median, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return {"median": float(np.median(pairs)), "low": float(interval.low), "high": float(interval.high)}


def _bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
