"""Every engine writes checkpoints before, during and after pruning, or takes those of one process and writes them back.

run_ranks(…, args=["write" or "back", FOLDER, ENGINE...])
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from adalora_scale.checkpoint.finding import find_checkpoint
from adalora_scale.checkpoint.state import allocator_position, gather, scatter
from adalora_scale.checkpoint.writing import write_checkpoint
from adalora_scale.engines.full import full_parameter
from adalora_scale.verify.engines import running
from adalora_scale.verify.problem import Problem, adapter_weights, token_loss

STEPS = 24
AT = {"before": 1, "during": 10, "after": 20}
"""tinit is 2, the final allocation 18."""


def problem_of(ranks):
    return Problem(model=None, device=torch.device("cpu"), ranks=ranks, steps=STEPS, preset="paper")


def write(folder, runner, model, step):
    gathered = gather(model, runner.allocator.sharding, runner.allocator)
    write_checkpoint(folder, step, gathered, {}, {"allocator": allocator_position(runner.allocator)}, {})


def train(engine, problem, folder, rank, ranks):
    """Train and leave checkpoints in FOLDER/ENGINE, and the live weights beside them as the engine itself gathers."""
    model = problem.adapted_model(torch.float32)
    with running(engine, "plain", problem, model) as runner:
        for number, batch in enumerate(problem.batches(model.config.vocab_size)[: max(AT.values())], start=1):
            runner.begin(last=True)
            runner.backward(token_loss(runner.model, batch.part(rank, ranks)) * ranks)
            runner.step(last=True)
            if number in AT.values():
                write(folder, runner, model, number)
                live = {f"{n}.{f}": full_parameter(w, model).clone() for n, own in adapter_weights(model).items()
                        for f, w in own.items()}  # fmt: skip
                if rank == 0:
                    save_file(live, folder / f"live-{number}.safetensors")


def load_and_write(engine, problem, source, target):
    """Load each checkpoint of `source` into a new run of the engine and write it again to `target`."""
    for step in AT.values():
        model = problem.adapted_model(torch.float32)
        with torch.no_grad():
            for own in adapter_weights(model).values():
                for weight in own.values():
                    weight.fill_(7.0)  # what was not loaded would show
        with running(engine, "plain", problem, model) as runner:
            checkpoint = find_checkpoint(str(source / f"checkpoint-{step}"), source)
            scatter(checkpoint, model, runner.allocator.sharding, runner.allocator)
            write(target, runner, model, step)
            yield step, model, runner


if __name__ == "__main__":
    torch.set_num_threads(1)
    mode, folder, *engines = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    problem, folder = problem_of(ranks), Path(folder)
    for engine in engines:
        if mode == "write":
            train(engine, problem, folder / engine, rank, ranks)
        else:
            for _ in load_and_write(engine, problem, folder / f"{engine}-one", folder / f"{engine}-back"):
                pass
    dist.destroy_process_group()
