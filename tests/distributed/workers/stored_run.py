"""Runs of several ranks: one with a store, one from there on an empty disk, one whose store fails at the end.

run_ranks(…, args=[FOLDER, URL])
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from adalora_scale.errors import UserError
from adalora_scale.store.client import Store, StoreError
from adalora_scale.training import uploading
from adalora_scale.training.run import train
from tests.distributed.launcher import report
from tests.training.short_run import config

SHORT = ["training.max_steps=6", "adalora.tinit=0", "adalora.tfinal=2", "data.eval=null", "adalora.deltaT=1",
         "training.gradient_accumulation_steps=1"]  # fmt: skip


def refused(self: Store, source: Path, name: str) -> None:
    raise StoreError(f"{self}: {name} cannot be written: no more room.")


def main(folder: Path, url: str) -> None:
    torch.set_num_threads(1)
    store = f"training.output_store={url}"
    train(config(folder / "out", *SHORT, store, "engine.name=fsdp2", "training.async_save=true"))
    dist.barrier()
    if os.environ["RANK"] == "0":  # the disk is new, and what the run left at step 6 is not on the store
        shared = Store("test", url)
        shared.remove("checkpoint-6/manifest.json")
        shared.remove_folder("checkpoint-6")
        shutil.rmtree(folder / "kept", ignore_errors=True)
        (folder / "out").rename(folder / "kept")
    dist.barrier()
    train(config(folder / "out", *SHORT, store, "engine.name=fsdp2", "training.resume_from_checkpoint=auto"))
    dist.barrier()
    uploading._PAUSES_S = ()
    Store.put = refused
    full = config(folder / "full", *SHORT, "training.max_steps=2", "adalora.tfinal=1", store.replace("/run", "/full"))
    try:
        train(full)
    except UserError as error:
        report(raised=str(error), left=sorted(path.name for path in (folder / "full").iterdir()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
