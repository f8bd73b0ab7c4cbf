"""Every engine writes the same state twice at once: with all ranks waiting, and while training goes on.

run_ranks(…, args=[FOLDER, ENGINE...]) → reports what each rank raised where rank 1's disk took no more.
"""

from __future__ import annotations

import resource
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from adalora_scale.checkpoint import format as files
from adalora_scale.checkpoint.background import BackgroundWriter
from adalora_scale.checkpoint.draft import Draft
from adalora_scale.checkpoint.rng import rng_state
from adalora_scale.checkpoint.state import allocator_position, gather
from adalora_scale.checkpoint.writing import write_checkpoint
from adalora_scale.errors import UserError
from adalora_scale.training.signals import FAILED, StopRequest
from adalora_scale.verify.engines import running
from adalora_scale.verify.problem import Problem, token_loss
from tests.distributed.launcher import report

AT, STEPS = (3, 7, 20), 24
"""Two before the final allocation (step 18), so that buffers are used again, and one after it."""


class Trained:
    """A run of one engine."""

    def __init__(self, problem, model, runner, rank, ranks):
        self.model, self.runner, self.rank, self.ranks = model, runner, rank, ranks
        self.batches = problem.batches(model.config.vocab_size)
        self.step = 0

    def go(self):
        self.runner.begin(last=True)
        self.runner.backward(token_loss(self.runner.model, self.batches[self.step].part(self.rank, self.ranks)))
        self.runner.step(last=True)
        self.step += 1

    def state(self):
        allocator = self.runner.allocator
        gathered = gather(self.model, allocator.sharding, allocator)
        return gathered, rng_state(), {"allocator": allocator_position(allocator)}, {"text.json": f"{self.step}\n"}


def same_bytes(folder, trained):
    """Write twice; the copies' thread waits until the weights have changed."""
    writer, moved = BackgroundWriter(folder.name), threading.Event()
    write_tensors = files.write_tensors

    def later(path, tensors):
        if threading.current_thread().name == "checkpoint":
            assert moved.wait(60)
        return write_tensors(path, tensors)

    files.write_tensors = later
    try:
        while trained.step < STEPS:
            trained.go()
            if trained.step in AT:
                gathered, extras, content, texts = trained.state()
                write_checkpoint(folder / "stopped", trained.step, gathered, extras, content, texts)
                draft = Draft.of(folder / "going", trained.step, gathered, content, texts)
                moved.clear()
                writer.start(draft, gathered.groups, extras)
                trained.go()
                trained.go()
                moved.set()
        writer.settle()
    finally:
        files.write_tensors = write_tensors


def one_disk_is_full(folder, trained):
    """Rank 1 may write files of 4 kB; all ranks end after the same step, with the same words."""
    writer, stop = BackgroundWriter(f"{folder.name}-full"), StopRequest()
    stop.run = f"{folder.name}-full"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    trained.step = 0
    raised = None
    try:
        while trained.step < STEPS - 1 and raised is None:
            trained.go()
            if trained.step == 2:
                gathered, extras, content, texts = trained.state()
                writer.start(Draft.of(folder / "full", 1, gathered, content, texts), gathered.groups, extras)
                writer.settle()
                if trained.rank == 1:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
                writer.start(Draft.of(folder / "full", 2, gathered, content, texts), gathered.groups, extras)
            if stop.agreed(trained.step, FAILED if writer.failed else None):
                try:
                    writer.settle()
                except UserError as error:
                    raised = str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = sorted(path.name for path in (folder / "full").iterdir())
    return {"raised": raised, "step": trained.step, "left": left}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, *engines = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    problem = Problem(model=None, device=torch.device("cpu"), ranks=ranks, steps=STEPS, preset="paper")
    for engine in engines:
        model = problem.adapted_model(torch.float32)
        with running(engine, "plain", problem, model) as runner:
            trained = Trained(problem, model, runner, rank, ranks)
            same_bytes(Path(folder) / engine, trained)
            report(**{engine: one_disk_is_full(Path(folder) / engine, trained)})
    dist.destroy_process_group()
