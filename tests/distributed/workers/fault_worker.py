"""A run on several ranks to which something happens: a signal to one rank, a disk that is full for one, other folders.

run_ranks(…, args=[WHAT, ENGINE, MODEL, DATA, FOLDER]); WHAT is signal, full or apart.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from adalora_scale.checkpoint import writing
from adalora_scale.errors import Interrupted, UserError
from adalora_scale.training.run import make_trainer, prepare
from tests.distributed.launcher import report
from tests.distributed.workers.trainer_worker import config_of

AT = 5


def before_step(trainer, step, action):
    inner = trainer.training_step

    def training_step(*args, **kwargs):
        if trainer.state.global_step == step:
            action()
        return inner(*args, **kwargs)

    trainer.training_step = training_step


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, engine, model, data, folder = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    extra = ["training.save_steps=4"]
    if what == "apart":  # each machine has its own disk under the same name
        extra = [f"training.output_dir={folder}/out-{rank}"]
        writing._SETTLES_S = 1.0
    config = config_of(engine, "sft", model, data, folder, ranks, extra)
    try:
        trainer = make_trainer(config, prepare(config))
        if rank == ranks - 1 and what == "signal":
            before_step(trainer, AT, lambda: os.kill(os.getpid(), signal.SIGUSR1))
        if rank == ranks - 1 and what == "full":
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            before_step(trainer, AT, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard)))
        trainer.train()
        report(ended="trained")
    except Interrupted as stopped:
        report(ended="interrupted", code=stopped.code)
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        report(ended="refused", message=str(error))
    report(found=sorted(path.name for path in Path(folder, "out").glob("*checkpoint-*")))
    dist.destroy_process_group()
