"""`adalora-scale train` on ranks, the last of which is killed at a moment that is given.

run_ranks(…, args=[MOMENT, the verb's arguments…])

MOMENT is "never" or a place and a step of the run: "forward:18" (before the step's forward), "update:7" (in the
optimizer step, when gradients are reduced and no weight has moved) or "saving:16" (this rank's file of the checkpoint
is written, the checkpoint is not complete).
"""

import contextlib
import os
import signal
import sys
from unittest import mock

import torch

from adalora_scale.checkpoint.draft import Draft
from adalora_scale.cli import main
from adalora_scale.controller import RankAllocator
from adalora_scale.training.trainers import AdaLoraSFTTrainer


def die():
    if int(os.environ["RANK"]) == int(os.environ["WORLD_SIZE"]) - 1:
        print("killed", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)


def replaced(kind, method, around):
    original = getattr(kind, method)
    return mock.patch.object(kind, method, lambda self, *args, **kwargs: around(self, original, *args, **kwargs))


def killed_at(moment):
    place, _, step = moment.partition(":")

    def forward(trainer, original, *args, **kwargs):
        if trainer.state.global_step == int(step) - 1:
            die()
        return original(trainer, *args, **kwargs)

    def update(allocator, original, *args, **kwargs):
        original(allocator, *args, **kwargs)
        if allocator.step == int(step):
            die()

    def saving(draft, original, *args, **kwargs):
        written = original(draft, *args, **kwargs)
        if draft.final.name == f"checkpoint-{step}":
            die()
        return written

    match place:
        case "forward":
            return replaced(AdaLoraSFTTrainer, "training_step", forward)
        case "update":
            return replaced(RankAllocator, "_before_update", update)
        case "saving":
            return replaced(Draft, "write_own", saving)
        case "never":
            return contextlib.nullcontext()
    raise ValueError(moment)


if __name__ == "__main__":
    torch.set_num_threads(1)
    moment, *arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    with killed_at(moment):
        sys.exit(main(["train", *arguments]))
