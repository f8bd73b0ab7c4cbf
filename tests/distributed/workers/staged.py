"""An adapter frozen between two steps, after attach: what of it still moved, on this rank.

run_ranks(…, args=[ENGINE…])
"""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adalora_scale import AdaLoraConfig, RankAllocator, inject_adalora
from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.engines.pieces import local
from tests.distributed.launcher import report
from tests.distributed.workers.guard_worker import ZERO_2
from tests.toy import Toy

# With statistics of every factor, each of which has to wait.
CONFIG = AdaLoraConfig(preset="paper", init_r=6, target_r=4, tinit=15, tfinal=4, deltaT=2, orth_reg_weight=0.3)
NAME = "blocks.1.up"


def wrapped(engine, model):
    if engine == "ddp":  # as DDP itself wants it where a parameter gets no gradient
        return DistributedDataParallel(model, find_unused_parameters=True)
    if engine == "fsdp2":
        for layer in (layer for block in model.blocks for layer in block.values()):
            fully_shard(layer)
        return fully_shard(model)
    return model


def run(engine):
    torch.manual_seed(0)
    model = inject_adalora(Toy(), CONFIG)
    runner = wrapped(engine, model)
    optimizer = torch.optim.AdamW([p for p in runner.parameters() if p.requires_grad], lr=1e-2)
    target = optimizer
    if engine == "zero2":
        runner, target, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO_2)
    allocator = RankAllocator(runner, CONFIG, total_step=20).attach(target)
    layer = dict(adapter_layers(model))[NAME]
    spans = {span.tensor.name: index for index, span in enumerate(allocator.sharding.spans)}
    frozen, other = spans[f"{NAME}.lora_A"], spans[f"{NAME}.lora_B"]
    before = ()
    for step in range(6):
        if step == 2:
            layer.lora_A.requires_grad_(False)
            before = state(allocator, frozen), state(allocator, other)
        torch.manual_seed(100 * step + dist.get_rank())
        loss = runner(torch.randint(0, 32, (4, 8))).square().mean()
        if engine == "zero2":
            runner.backward(loss)
            runner.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    after = state(allocator, frozen), state(allocator, other)
    allocator.check_consistency()
    return {
        "frozen": all(map(torch.equal, before[0], after[0])),
        "other_moved": not any(torch.equal(a, b) for a, b in zip(before[1], after[1], strict=True) if a.numel()),
        "gradient": layer.lora_A.grad is not None,
        "held": int(local(layer.lora_A.detach()).numel()),
    }


def state(allocator, index):
    """Copies of weight, moments, Ī and Ū of a span."""
    moments = allocator.sharding.moments()[index]
    statistics = [values[index] for values in allocator.statistics.values()]
    own = [allocator.sharding.spans[index].weight, *moments, *statistics]
    return [tensor.clone() for tensor in own]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        try:
            report(**{name: run(name)})
        except Exception as error:
            report(**{name: f"{type(error).__name__}: {error}"})
        dist.barrier()
    dist.destroy_process_group()
