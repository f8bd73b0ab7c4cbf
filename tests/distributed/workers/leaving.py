"""Leave while one of gloo's threads is at work, in a group that something keeps, as DeepSpeed's globals do."""

from __future__ import annotations

import torch
import torch.distributed as dist

from adalora_scale.cluster.leaving import leave_process_group
from tests.distributed.launcher import report

MEGABYTES = 200

if __name__ == "__main__":
    dist.init_process_group("gloo")
    kept = dist.group.WORLD
    sent, received = torch.ones(MEGABYTES << 20, dtype=torch.uint8), torch.empty(MEGABYTES << 20, dtype=torch.uint8)
    work = kept.allgather([[received]], [sent])
    at_work = not work.is_completed()
    leave_process_group()
    report(at_work=at_work, left=not dist.is_initialized(), at_rest=work.is_completed())
