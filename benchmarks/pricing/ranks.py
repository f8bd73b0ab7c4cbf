"""What the allocator adds to a step on each engine, counted on real ranks: collectives, bytes, operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from adalora_scale.errors import UserError
from adalora_scale.verify.engines import running
from adalora_scale.verify.problem import Problem, token_loss
from benchmarks.pricing.counting import Counter, hooks_counted

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
PRESETS = ("default", "paper")
STEPS = 12
"""Enough for both kinds of step."""


def start_ranks(count: int) -> dict[str, Any]:
    """Return the figures by cell ("ddp, default"), counted on `count` CPU processes of this machine.

    Raises:
        UserError: the ranks failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "figures.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command += ["-m", "benchmarks.pricing.ranks", str(output)]
        environment = {"OMP_NUM_THREADS": "1"} | os.environ | {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(f"--ranks {count}: the ranks failed.\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
        figures: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return figures


@dataclass
class Added:
    """What the allocator added to the steps of a run."""

    counters: list[Counter] = field(default_factory=list)
    """One a step."""
    allocated: list[bool] = field(default_factory=list)
    frozen: list[bool] = field(default_factory=list)
    """Whether the final allocation was over after a step."""
    calls: int = 0
    """Of the optimizer in a step."""
    split_rows: int = 0


def added(engine: str, problem: Problem, steps: int = STEPS) -> Added:
    """Train on this process group and count in every step what the allocator adds."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = problem.adapted_model()
    batches = problem.batches(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    seen = Added()
    with hooks_counted() as counters, running(engine, "plain", problem, model) as runner:
        allocator = runner.allocator
        for batch in batches[:steps]:
            counters.append(Counter())
            runner.begin(last=True)
            runner.backward(token_loss(runner.model, batch.part(rank, ranks)) * ranks)
            runner.step(last=True)
            allocation = allocator.last_allocation
            seen.allocated.append(allocation is not None and allocation.step == allocator.step)
            seen.frozen.append(allocator.frozen)
        seen.counters, seen.calls = counters, allocator.sharding.calls_per_step
        seen.split_rows = allocator._attached().reduction.split_rows
    return seen


def _main(output: Path) -> None:
    dist.init_process_group("gloo")
    figures = {}
    for preset in PRESETS:
        for engine in ENGINES:
            problem = Problem(model=None, device=torch.device("cpu"), ranks=dist.get_world_size(), preset=preset)
            seen = added(engine, problem)
            last = dict(zip(seen.allocated, seen.counters, strict=True))
            normal, allocation = last[False], last[True]
            figures[f"{engine}, {preset}"] = {"step": normal.as_dict(), "allocation": allocation.as_dict()}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(figures), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
