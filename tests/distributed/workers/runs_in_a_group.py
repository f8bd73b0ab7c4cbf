"""Several runs one after another in one process group: one stopped by a signal, then some whose replicas drift apart.

run_ranks(…, args=[MODEL, DATA, FOLDER]); each run has its folder there.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.controller.guard import RanksDisagree
from adalora_scale.errors import Interrupted
from adalora_scale.training.run import make_trainer, prepare
from tests.distributed.launcher import report
from tests.distributed.workers.fault_worker import AT, before_step
from tests.distributed.workers.trainer_worker import config_of


def contents(folder):
    """Every file of the folder's checkpoints with a digest of its bytes."""
    files = [path for path in sorted(folder.glob("checkpoint-*/*")) if path.is_file()]
    return {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def run(name, model, data, folder, *extra, drifts=False, signalled=False):
    """Train, with something happening to the last rank before a step, and return how it ended."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    config = config_of("ddp", "sft", model, data, folder / name, ranks, extra)
    trainer = make_trainer(config, prepare(config))
    out, before = folder / name / "out", {}

    def drift():
        before.update(contents(out))
        if rank == ranks - 1:
            first = next(layer for _, layer in adapter_layers(trainer.model))
            first.lora_B.data[0] += 1e-3  # in every triplet, because some will be pruned

    if drifts:
        before_step(trainer, AT, drift)
    if signalled and rank == ranks - 1:
        before_step(trainer, AT, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    said = ""
    try:
        trainer.train()
        ended = "trained"
        trainer.save_model()
    except Interrupted:
        ended = "interrupted"
    except RanksDisagree as error:
        ended, said = "refused", str(error)
    dist.barrier()
    return {
        "ended": ended,
        "said": said,
        "step": trainer.state.global_step,
        "before": before,
        "after": contents(out),
        "saved": (out / "adapter_model.safetensors").exists(),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    model, data, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    every = "training.save_steps=4"
    report(stopped=run("stopped", model, data, folder, every, signalled=True))
    report(next=run("next", model, data, folder, every))
    report(drifted=run("drifted", model, data, folder, every, drifts=True))
    report(at_end=run("at_end", model, data, folder, "training.save_strategy=no", drifts=True))
    report(unguarded=run("unguarded", model, data, folder, every, "adalora.guard_every=0", drifts=True))
    dist.destroy_process_group()
