"""A toy in training on ranks, on each engine asked for; rank 0 records scores, every rank says what it ranked last.

run_ranks(…, args=[FOLDER, "ddp", "zero2", …])
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.adalora.spending import Spending
from adalora_scale.controller import RankAllocator
from adalora_scale.training.records import JsonLines
from adalora_scale.training.score_records import write_scores
from tests.controller.test_allocator import ALLOCATIONS, TOTAL, options
from tests.distributed.launcher import report
from tests.toy import Toy

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()


ranked = []
"""What `Spending.cut` was given: the very numbers that an allocation decided on."""
cut = Spending.cut


def seen(self, scores, step):
    ranked.append(scores.tolist())
    return cut(self, scores, step)


Spending.cut = seen


def partitioned(model, optimizer, stage):
    import deepspeed

    zero = {"stage": stage, "stage3_param_persistence_threshold": 100}
    config = {
        "train_micro_batch_size_per_gpu": 8 // world_size, "zero_optimization": zero,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
    }  # fmt: skip
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine):
    torch.manual_seed(0)
    model = inject_adalora(Toy(), options())
    if engine == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    wrapped = DistributedDataParallel(model) if engine == "ddp" else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0.01)
    if zero := engine.startswith("zero"):
        wrapped = partitioned(model, optimizer, int(engine[4:]))
    allocator = RankAllocator(model if zero else wrapped, options(), total_step=TOTAL)
    allocator.attach(wrapped if zero else optimizer)
    ranked.clear()
    lines = JsonLines(Path(sys.argv[1]) / engine / "scores.jsonl") if rank == 0 else None
    generator = torch.Generator().manual_seed(1)
    for step in range(1, TOTAL + 1):
        ids = torch.randint(0, 32, (8, 12), generator=generator)[rank::world_size]
        loss = F.cross_entropy(wrapped(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        if zero:
            wrapped.backward(loss)
            wrapped.step()
        else:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if lines is not None and step in ALLOCATIONS:
            write_scores(lines, allocator)
    assert allocator.last_allocation.scores.tolist() == ranked[-1]
    return list(ranked)


for engine in sys.argv[2:]:
    report(**{engine: train(engine)})
dist.destroy_process_group()
