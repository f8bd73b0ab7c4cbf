"""Bytes a rank holds for the adapters, read from live tensors during an optimizer step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from adalora_scale.engines.registry import ENGINES as engines
from adalora_scale.quantization.linear import Linear4bit
from adalora_scale.verify.engines import adapter_elements, running
from adalora_scale.verify.problem import SEED, Problem, token_loss

ENGINES = tuple(name for name, engine in engines.items() if engine.shares_everything)
BASE = "4-bit base"
"""Weights of the frozen base: packed codes, scales, second level, and what stays in 16 or 32 bits."""
BASE_TOLERANCE = 0.03
"""Largest relative excess of a rank's share of the base over 1/N."""
KINDS = {"weights": 1, "gradients": 1, "moments": 2, "importance": 2, "accumulated gradients": 1}
"""What is weighed, and how many float32 copies of the adapters it is in one process: fp32 masters; the gradients given
to the optimizer, at its step; Adam's moments; Ī and Ū; the buffer in which ZeRO-3 accumulates gradients besides."""
TOLERANCE = 0.05
"""Largest relative difference from 1/N of one process."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """One row of the memory table: bytes of one kind, the most that any rank holds."""

    engine: str
    ranks: int
    kind: str
    bytes_per_rank: int
    one_process: int
    share: float
    """bytes_per_rank / one_process; 1 / ranks where nothing is held twice."""
    verdict: str
    """pass or fail."""

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class MemoryProblem(Problem):
    """A random Llama of about 100 million parameters."""

    def full_precision_model(self, dtype: torch.dtype) -> nn.Module:
        """Return the model with random weights."""
        from transformers import AutoModelForCausalLM, LlamaConfig

        shape = LlamaConfig(
            vocab_size=16384,
            hidden_size=768,
            intermediate_size=2048,
            num_hidden_layers=12,
            num_attention_heads=12,
            num_key_value_heads=12,
            tie_word_embeddings=True,
        )
        torch.manual_seed(SEED)
        return AutoModelForCausalLM.from_config(shape).to(dtype)


def measure(engine: str, problem: MemoryProblem) -> list[Usage]:
    """Take one optimizer step on `engine` and weigh what every rank holds; a collective call."""
    own, elements, base = _weigh(engine, problem)
    everyone: list[dict[str, int]] = [{}] * problem.ranks
    dist.all_gather_object(everyone, own)
    one_process = {kind: 4 * copies * elements for kind, copies in KINDS.items()}
    if problem.load_in_4bit:
        one_process[BASE] = base
    return [
        _usage(engine, problem.ranks, kind, max(usage[kind] for usage in everyone), one_process[kind])
        for kind in one_process
        if kind in own
    ]


def _usage(engine: str, ranks: int, kind: str, largest: int, one_process: int) -> Usage:
    share = largest / one_process
    excess = share * ranks - 1
    passed = excess <= BASE_TOLERANCE if kind == BASE else abs(excess) <= TOLERANCE
    return Usage(
        engine=engine,
        ranks=ranks,
        kind=kind,
        bytes_per_rank=largest,
        one_process=one_process,
        share=share,
        verdict="pass" if passed else "fail",
    )


def _weigh(engine: str, problem: MemoryProblem) -> tuple[dict[str, int], int, int]:
    """Return this rank's bytes by kind, the number of elements of all adapters, and the base's bytes in one process."""
    model = problem.adapted_model()
    elements = adapter_elements(model)
    base = storage_bytes(_frozen(model))
    batch = problem.batches(model.config.vocab_size)[0]  # type: ignore[union-attr, arg-type]
    used = dict.fromkeys(("weights", "gradients"), 0)

    def weigh_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        # Under ZeRO-3 one call a sub-group, each with the masters and gradients of that sub-group alone.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        used["weights"] += storage_bytes(parameters)
        used["gradients"] += storage_bytes(p.grad for p in parameters if p.grad is not None)

    with running(engine, "plain", problem, model) as runner:
        runner.optimizer.register_step_pre_hook(weigh_step)  # after the allocator's own
        row = batch.part(dist.get_rank(), problem.global_batch)  # one sequence is enough
        runner.backward(token_loss(runner.model, row))
        runner.step(last=True)
        states = [value for state in runner.optimizer.state.values() for value in state.values()]
        used["moments"] = storage_bytes(value for value in states if isinstance(value, Tensor) and value.numel() > 1)
        used["importance"] = storage_bytes(chain(*runner.allocator.statistics.values()))
        buffer = getattr(getattr(runner.model, "optimizer", None), "grad_partitions_flat_buffer", None)
        if buffer is not None:
            used["accumulated gradients"] = storage_bytes([buffer])
        if problem.load_in_4bit:
            used[BASE] = storage_bytes(_frozen(model))
    return used, elements, base


def _frozen(model: nn.Module) -> Iterator[Tensor]:
    """Yield what this rank holds of the base: parameters, ZeRO-3's partitions of them, and the second levels."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            yield parameter
            if (partition := getattr(parameter, "ds_tensor", None)) is not None:
                yield partition
    for module in model.modules():
        if isinstance(module, Linear4bit):
            yield module.nested


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the storages behind the tensors, each once."""
    storages = {}
    for tensor in tensors:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
