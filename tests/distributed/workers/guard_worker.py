"""Ranks that disagree on purpose: options, base model, an adapter that drifted, an adapter nobody reduces."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from adalora_scale import AdaLoraConfig, RankAllocator, inject_adalora
from tests.distributed.launcher import report
from tests.toy import Toy


def main(case):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank if case == "base" else 0)
    model = Toy()
    config = AdaLoraConfig(
        init_r=6, target_r=4, tinit=0, tfinal=0.3, deltaT=2, beta1=0.9 if case == "config" and rank else 0.85
    )
    message = ""
    try:
        if case == "late":
            fully_shard(model)
            inject_adalora(model, config)
            runner = model
        else:
            inject_adalora(model, config)
            runner = model if case == "unwrapped" else torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW([p for p in runner.parameters() if p.requires_grad], lr=1e-2)
        allocator = RankAllocator(runner, config, total_step=20).attach(optimizer)
        for step in range(4):
            torch.manual_seed(100 * step + rank)
            runner(torch.randint(0, 32, (4, 8))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            if case == "drift" and step == 2 and rank == 1:
                next(layer for layer in model.modules() if hasattr(layer, "lora_B")).lora_B.data[3, 1] += 1e-6
        allocator.check_consistency()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
    report(message=message)
    dist.barrier()
    dist.destroy_process_group()


main(sys.argv[1])
