"""Bytes a rank holds for the adapters, read from live tensors during an optimizer step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from adalora_scale.verify.engines import adapter_elements, running
from adalora_scale.verify.problem import SEED, Problem, token_loss

ENGINES = ("fsdp2", "zero3")
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

    def base_model(self, dtype: torch.dtype) -> nn.Module:
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
    own, elements = _weigh(engine, problem)
    everyone: list[dict[str, int]] = [{}] * problem.ranks
    dist.all_gather_object(everyone, own)
    rows = []
    for kind, copies in KINDS.items():
        if kind not in own:
            continue
        largest, one_process = max(usage[kind] for usage in everyone), 4 * copies * elements
        share = largest / one_process
        verdict = "pass" if abs(share * problem.ranks - 1) <= TOLERANCE else "fail"
        rows.append(
            Usage(
                engine=engine,
                ranks=problem.ranks,
                kind=kind,
                bytes_per_rank=largest,
                one_process=one_process,
                share=share,
                verdict=verdict,
            )
        )
    return rows


def _weigh(engine: str, problem: MemoryProblem) -> tuple[dict[str, int], int]:
    """Return this rank's bytes by kind, and the number of elements of all adapters."""
    model = problem.adapted_model()
    elements = adapter_elements(model)
    batch = problem.batches(model.config.vocab_size)[0]  # type: ignore[union-attr, arg-type]
    used = dict.fromkeys(("weights", "gradients"), 0)

    def weigh_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        # Under ZeRO-3 one call a sub-group, each with the masters and gradients of that sub-group alone.
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        used["weights"] += _bytes(parameters)
        used["gradients"] += _bytes(p.grad for p in parameters if p.grad is not None)

    with running(engine, "plain", problem, model) as runner:
        runner.optimizer.register_step_pre_hook(weigh_step)  # after the allocator's own
        row = batch.part(dist.get_rank(), problem.global_batch)  # one sequence is enough
        runner.backward(token_loss(runner.model, row))
        runner.step(last=True)
        states = [value for state in runner.optimizer.state.values() for value in state.values()]
        used["moments"] = _bytes(value for value in states if isinstance(value, Tensor) and value.numel() > 1)
        used["importance"] = _bytes([*runner.allocator.sensitivity, *runner.allocator.uncertainty])
        buffer = getattr(getattr(runner.model, "optimizer", None), "grad_partitions_flat_buffer", None)
        if buffer is not None:
            used["accumulated gradients"] = _bytes([buffer])
    return used, elements


def _bytes(tensors: Iterable[Tensor]) -> int:
    """Sum the storages behind the tensors, each once."""
    storages = {}
    for tensor in tensors:
        storage = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
