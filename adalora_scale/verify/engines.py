"""One run on one engine, as a user writes it by hand: wrap the model, inject, attach, loop.

The optimizer gets the adapters in two parameter groups and ZeRO-3 cuts those into several sub-groups, so DeepSpeed
calls it more than once a step, as it does in real runs with weight-decay groups or billions of parameters.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from adalora_scale.controller import RankAllocator
from adalora_scale.engines.full import full_parameter
from adalora_scale.verify.problem import ACCUMULATION, Problem, adapter_weights, token_loss

ENGINES = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3", "zero3-offload")
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


class Engine(Protocol):
    """A wrapped model with its optimizer and the allocator attached to it."""

    model: Any
    optimizer: Optimizer
    """The torch optimizer whose step changes the weights."""
    allocator: RankAllocator

    def begin(self, *, last: bool) -> None:
        """Say before a micro-batch's forward whether it is the step's last, which reduces gradients over ranks."""

    def backward(self, loss: Tensor) -> None:
        """Take gradients of a micro-batch's share of the loss."""

    def step(self, *, last: bool) -> None:
        """Update the weights after the last micro-batch."""


@contextmanager
def running(engine: str, variant: str, problem: Problem, model: nn.Module) -> Iterator[Engine]:
    """Wrap `model` and attach an allocator; what the engine keeps in the process is removed afterwards."""
    runner: Engine
    if not engine.startswith("zero"):
        runner = _TorchEngine(engine, variant, problem, model)
        yield runner
    else:
        runner = _ZeroEngine(engine, variant, problem, model)
        try:
            yield runner
        finally:
            runner.close()
    del runner
    gc.collect()


def train(engine: str, variant: str, problem: Problem) -> Outcome:
    """Run one cell on this process group and return what it left; every rank calls it.

    Args:
        engine: one of `ENGINES`, or "single" for one process that works on whole global batches.
        variant: one of `VARIANTS`.
        problem: what is trained.
    """
    accumulation = ACCUMULATION if variant == "accumulation" else 1
    rank, ranks = (0, 1) if engine == "single" else (dist.get_rank(), problem.ranks)
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
    if engine != "single":
        dist.all_reduce(losses)
    outcome.eval_loss = losses.mean().item()
    return outcome


def _parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    factors = [list(weights.values()) for weights in adapter_weights(model).values()]
    half = len(factors) // 2
    return [{"params": [p for own in part for p in own]} for part in (factors[:half], factors[half:]) if part]


def _adamw(model: nn.Module, problem: Problem) -> torch.optim.AdamW:
    return torch.optim.AdamW(_parameter_groups(model), lr=problem.lr, weight_decay=problem.weight_decay)


class _TorchEngine:
    """One process, DDP, FSDP2 and HSDP."""

    def __init__(self, engine: str, variant: str, problem: Problem, model: nn.Module) -> None:
        self._engine = engine
        self._max_grad_norm = problem.max_grad_norm if variant == "clip" else None
        self.model: Any = model
        if engine == "ddp":
            self.model = nn.parallel.DistributedDataParallel(model)
        elif engine in ("fsdp2", "hsdp"):
            self.model = _fully_sharded(model, problem, hybrid=engine == "hsdp", bf16=variant == "bf16")
        self.optimizer: Optimizer = _adamw(self.model, problem)
        self.allocator = RankAllocator(self.model, problem.config, total_step=problem.steps).attach(self.optimizer)

    def begin(self, *, last: bool) -> None:
        if self._engine == "ddp":
            self.model.require_backward_grad_sync = last
        elif self._engine != "single":
            self.model.set_requires_gradient_sync(last)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, *, last: bool) -> None:
        if not last:
            return
        if self._max_grad_norm is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, self._max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()


def _fully_sharded(model: nn.Module, problem: Problem, *, hybrid: bool, bf16: bool) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    if hybrid:
        shape, names = (2, problem.ranks // 2), ("replicate", "shard")
        mesh = init_device_mesh(problem.device.type, shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(problem.device.type, (problem.ranks,))
    policy = MixedPrecisionPolicy()
    if bf16:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in model.modules():
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model


class _ZeroEngine:
    """DeepSpeed ZeRO-1, 2 and 3."""

    def __init__(self, engine: str, variant: str, problem: Problem, model: nn.Module) -> None:
        import deepspeed

        self.model, *_ = deepspeed.initialize(
            model=model,
            optimizer=_adamw(model, problem),
            config=zero_config(engine, variant, problem, adapter_elements(model)),
        )
        self.optimizer: Optimizer = self.model.optimizer.optimizer
        self._accumulation = ACCUMULATION if variant == "accumulation" else 1
        self.allocator = RankAllocator(model, problem.config, total_step=problem.steps).attach(self.model)

    def begin(self, *, last: bool) -> None:
        """DeepSpeed counts micro-batches itself."""

    def backward(self, loss: Tensor) -> None:
        self.model.backward(loss * self._accumulation)  # which divides by it again

    def step(self, *, last: bool) -> None:
        self.model.step()

    def close(self) -> None:
        self.model.destroy()


def adapter_elements(model: nn.Module) -> int:
    """Count the adapters' elements."""
    return sum(weight.numel() for factors in adapter_weights(model).values() for weight in factors.values())


def zero_config(engine: str, variant: str, problem: Problem, elements: int) -> dict[str, Any]:
    """Return DeepSpeed's configuration of a cell whose adapters have so many `elements`."""
    stage = int(engine[len("zero")])
    zero: dict[str, Any] = {"stage": stage}
    if engine.endswith("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        # λ stays whole between layers, A and B do not; each parameter group falls into about three sub-groups.
        zero["stage3_param_persistence_threshold"] = 100
        zero["sub_group_size"] = max(elements // (6 * problem.ranks), 1)
    accumulation = ACCUMULATION if variant == "accumulation" else 1
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": problem.global_batch // problem.ranks // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": problem.max_grad_norm if variant == "clip" else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
    if variant == "bf16":
        config["bf16"] = {"enabled": True}
        if stage == 1:  # BF16_Optimizer, a class of its own
            config["data_types"] = {"grad_accum_dtype": "fp32"}
    return config
