"""A toy in training on ranks, with DDP and with FSDP2; rank 0 records scores, every rank says what it ranked last."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.controller import RankAllocator
from adalora_scale.training.records import JsonLines
from adalora_scale.training.score_records import write_scores
from tests.controller.test_allocator import ALLOCATIONS, TOTAL, options
from tests.distributed.launcher import report
from tests.toy import Toy

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()


def train(engine):
    torch.manual_seed(0)
    model = inject_adalora(Toy(), options())
    if engine == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        wrapped = fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.01)
    allocator = RankAllocator(wrapped, options(), total_step=TOTAL).attach(optimizer)
    lines = JsonLines(Path(sys.argv[1]) / engine / "scores.jsonl") if rank == 0 else None
    generator = torch.Generator().manual_seed(1)
    for step in range(1, TOTAL + 1):
        ids = torch.randint(0, 32, (8, 12), generator=generator)[rank::world_size]
        loss = F.cross_entropy(wrapped(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if lines is not None and step in ALLOCATIONS:
            write_scores(lines, allocator)
    return allocator.last_allocation.scores.tolist()


report(ddp=train("ddp"), fsdp2=train("fsdp2"))
dist.destroy_process_group()
