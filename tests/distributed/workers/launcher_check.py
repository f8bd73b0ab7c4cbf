"""What test_launcher.py runs on every rank: sum, fail or hang, as the first argument says."""

import os
import subprocess
import sys

import torch
import torch.distributed as dist

from tests.distributed.launcher import report

arguments = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
action = arguments[0]
rank = int(os.environ["RANK"])
if action == "deepspeed":
    import deepspeed

    deepspeed.init_distributed(dist_backend="gloo")
else:
    dist.init_process_group("gloo")
print(f"hello from rank {rank}", flush=True)

if action == "fail" and rank == 1:
    raise RuntimeError("the cat ate rank 1's batch")
if action == "hang" and rank == 1:
    subprocess.Popen(["sleep", "600"], start_new_session=True)  # a child that outlives its parent unless found
    total = torch.ones(1)
    dist.all_reduce(total)  # the first two match
    dist.all_reduce(total)  # nobody else comes here
else:
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    if action == "hang":
        import time

        time.sleep(600)

report(total=total.item())
report(world_size=dist.get_world_size(), arguments=arguments, threads=os.environ["OMP_NUM_THREADS"], argv=sys.argv)
dist.destroy_process_group()
