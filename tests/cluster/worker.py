"""A rank that misbehaves as its argument says, under the same rank_log as launch/train.py."""

import os
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

from adalora_scale.cluster.evidence.rank_log import rank_log


def sleeps_here() -> None:
    time.sleep(60)


def main(behaviour: str) -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    last = rank == world_size - 1
    os.write(2, b"said by C\n")
    store = dist.FileStore(os.environ["ADALORA_STORE"], world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=4))
    dist.all_reduce(torch.ones(4))
    if behaviour == "different collectives":
        if last:
            dist.broadcast(torch.ones(7), src=1)
            sleeps_here()
        dist.all_reduce(torch.ones(7))
    dist.broadcast(torch.ones(3), src=0)
    if last and behaviour == "one rank sleeps":
        sleeps_here()
    if last and behaviour == "the last rank raises":
        raise ValueError("this rank met a bad row\nand more text")
    if last and behaviour == "the last rank is killed":
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(512))
    dist.barrier()


if __name__ == "__main__":
    with rank_log():
        main(sys.argv[1])
