"""What the allocator adds to a step on each engine, counted on real ranks: collectives, bytes, operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
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


def added(engine: str, problem: Problem, steps: int = STEPS) -> list[tuple[Counter, bool]]:
    """Train on this process group; for every step return what was added, and whether it allocated."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = problem.adapted_model()
    batches = problem.batches(model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    allocated: list[bool] = []
    with hooks_counted() as counters, running(engine, "plain", problem, model) as runner:
        for batch in batches[:steps]:
            counters.append(Counter())
            runner.begin(last=True)
            runner.backward(token_loss(runner.model, batch.part(rank, ranks)) * ranks)
            runner.step(last=True)
            allocation = runner.allocator.last_allocation
            allocated.append(allocation is not None and allocation.step == runner.allocator.step)
    return list(zip(counters, allocated, strict=True))


def _main(output: Path) -> None:
    dist.init_process_group("gloo")
    figures = {}
    for preset in PRESETS:
        for engine in ENGINES:
            problem = Problem(model=None, device=torch.device("cpu"), ranks=dist.get_world_size(), preset=preset)
            steps = added(engine, problem)
            normal = [counts for counts, allocated in steps if not allocated][-1]
            allocation = [counts for counts, allocated in steps if allocated][-1]
            figures[f"{engine}, {preset}"] = {"step": normal.as_dict(), "allocation": allocation.as_dict()}
    if dist.get_rank() == 0:
        output.write_text(json.dumps(figures), encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
