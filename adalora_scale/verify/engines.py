"""One run on one engine, as a user writes it by hand: wrap the model, inject, attach, loop.

The optimizer gets the adapters in two parameter groups and ZeRO-3 cuts those into several sub-groups, so DeepSpeed
calls it more than once a step, as it does in real runs with weight-decay groups or billions of parameters.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adalora_scale.controller import RankAllocator
from adalora_scale.engines.by_hand import Bench, ByHand
from adalora_scale.engines.full import full_parameter
from adalora_scale.engines.registry import ENGINES as engines
from adalora_scale.engines.replicated import OneProcess
from adalora_scale.verify.problem import ACCUMULATION, Problem, adapter_weights, token_loss

_TRIALS = {name: trial for engine in engines.values() for name, trial in engine.trials().items()}
ENGINES = tuple(_TRIALS)
SINGLE = "single"
"""One process that works on whole global batches."""
VARIANTS = ("plain", "accumulation", "checkpointing", "clip", "bf16")
EVALUATED = 4  # global batches of the final loss


@dataclass
class Outcome:
    """What a run leaves behind."""

    masks: dict[int, dict[str, list[bool]]] = field(default_factory=dict)
    """Step of an allocation -> module -> kept triplets."""
    gaps: dict[int, float] = field(default_factory=dict)
    """Step of an allocation -> relative gap at the cut."""
    weights: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Final fp32 adapters, whole, on the CPU."""
    eval_loss: float = float("nan")
    """Mean token loss after the last step, over all ranks."""
    margin: float = float("inf")
    """Of the reference: how far from a tie the routers of a mixture were (`verify/margins.py`)."""


class Runner:
    """A wrapped model with its optimizer and the allocator attached to it.

    Args:
        hand: the loop of an engine.
        problem: what is trained.
    """

    def __init__(self, hand: ByHand, problem: Problem) -> None:
        self._hand = hand
        self.model: Any = hand.model
        self.optimizer = hand.optimizer
        """The torch optimizer whose step changes the weights."""
        self.allocator = RankAllocator(hand.adapted, problem.config, total_step=problem.steps).attach(hand.target)
        self.begin, self.backward, self.step = hand.begin, hand.backward, hand.step


@contextmanager
def running(engine: str, variant: str, problem: Problem, model: nn.Module) -> Iterator[Runner]:
    """Wrap `model` and attach an allocator; what the engine keeps in the process is removed afterwards."""
    hand = (OneProcess() if engine == SINGLE else _TRIALS[engine]).by_hand(_bench(variant, problem, model))
    try:
        runner = Runner(hand, problem)
        yield runner
        del runner
    finally:
        hand.close()
    del hand
    gc.collect()


def train(engine: str, variant: str, problem: Problem) -> Outcome:
    """Run one cell on this process group and return what it left; every rank calls it.

    Args:
        engine: one of `ENGINES`, or `SINGLE`.
        variant: one of `VARIANTS`.
        problem: what is trained.
    """
    accumulation = ACCUMULATION if variant == "accumulation" else 1
    rank, ranks = (0, 1) if engine == SINGLE else (dist.get_rank(), problem.ranks)
    model = problem.adapted_model(torch.bfloat16 if variant == "bf16" else torch.float32)
    if variant == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    batches = problem.batches(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    outcome = Outcome()
    with running(engine, variant, problem, model) as runner:
        for batch in batches:
            mine = batch.part(rank, ranks)
            for index in range(accumulation):
                last = index == accumulation - 1
                # Engines average over ranks; the mean over the global batch's tokens is a sum over ranks.
                runner.begin(last=last)
                runner.backward(token_loss(runner.model, mine.part(index, accumulation)) * ranks)
                runner.step(last=last)
            allocation = runner.allocator.last_allocation
            if allocation is not None and allocation.step == runner.allocator.step:
                pattern = runner.allocator.rank_pattern()
                outcome.masks[allocation.step] = {k.removesuffix(".lora_E"): row for k, row in pattern.items()}
                outcome.gaps[allocation.step] = allocation.gap
        with torch.no_grad():
            losses = torch.stack([token_loss(runner.model, b.part(rank, ranks)) for b in batches[:EVALUATED]])
            for name, factors in adapter_weights(model).items():
                outcome.weights[name] = {f: full_parameter(w, model).float().cpu().clone() for f, w in factors.items()}
    if engine != SINGLE:
        dist.all_reduce(losses)
    outcome.eval_loss = losses.mean().item()
    return outcome


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    factors = [list(weights.values()) for weights in adapter_weights(model).values()]
    half = len(factors) // 2
    return [{"params": [p for own in part for p in own]} for part in (factors[:half], factors[half:]) if part]


def _adamw(model: nn.Module, problem: Problem) -> torch.optim.AdamW:
    return torch.optim.AdamW(_parameter_groups(model), lr=problem.learning_rate, weight_decay=problem.weight_decay)


def adapter_elements(model: nn.Module) -> int:
    """Count the adapters' elements."""
    return sum(weight.numel() for factors in adapter_weights(model).values() for weight in factors.values())


def _bench(variant: str, problem: Problem, model: nn.Module) -> Bench:
    accumulation = ACCUMULATION if variant == "accumulation" else 1
    return Bench(
        model=model,
        optimizer=partial(_adamw, problem=problem),
        ranks=problem.ranks,
        device=problem.device,
        micro_batch=problem.global_batch // problem.ranks // accumulation,
        accumulation=accumulation,
        max_grad_norm=problem.max_grad_norm if variant == "clip" else None,
        bf16=variant == "bf16",
        elements=adapter_elements(model),
    )


def why_not(engine: str, ranks: int) -> str:
    """Return why an engine cannot run here, or nothing."""
    return _TRIALS[engine].why_not(ranks)
