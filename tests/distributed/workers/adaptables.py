"""Adapters on an embedding, convolutions and a linear layer, trained by hand on an engine.

run_ranks(…, args=[ENGINE…])    ENGINE is fsdp2, zero2 or zero3
"""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
import torch.nn.functional as F

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.engines.full import full_parameter
from tests.adalora import tiny
from tests.distributed.launcher import report

STEPS, ROWS = 12, 4
TARGETS = ["words", "wide", "along", "pointwise", "out"]
CONFIG = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, target_modules=TARGETS, tinit=2, tfinal=4, deltaT=2)


def train(engine):
    """Train and return (adapter tensors by name, the final mask)."""
    rank, ranks = (0, 1) if engine == "single" else (dist.get_rank(), dist.get_world_size())
    torch.manual_seed(0)
    model = inject_adalora(tiny.mixed(), CONFIG)
    wrapped = model
    if engine == "fsdp2":
        from torch.distributed.fsdp import fully_shard

        wrapped = fully_shard(model, mesh=dist.init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.01)
    if engine.startswith("zero"):
        import deepspeed

        zero = {"stage": int(engine[-1])} | ({"stage3_param_persistence_threshold": 10} if engine == "zero3" else {})
        options = {
            "train_micro_batch_size_per_gpu": ROWS // ranks, "zero_optimization": zero,
            "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        }  # fmt: skip
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=options)
    allocator = RankAllocator(model, CONFIG, total_step=STEPS)
    allocator.attach(wrapped if engine.startswith("zero") else optimizer)
    generator = torch.Generator().manual_seed(7)
    for _ in range(STEPS):
        ids = torch.randint(0, 32, (ROWS, 12), generator=generator)
        mine = ids[rank * ROWS // ranks : (rank + 1) * ROWS // ranks]
        loss = F.cross_entropy(wrapped(mine), mine[:, 0] % 3)
        if engine.startswith("zero"):
            wrapped.backward(loss)
            wrapped.step()
        else:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    weights = {}
    for name, layer in adapter_layers(model):
        for factor in ("lora_A", "lora_E", "lora_B"):
            weights[f"{name}.{factor}"] = full_parameter(getattr(layer, factor), model).detach().float().tolist()
    return weights, allocator.mask.tolist()


def main(*engines):
    dist.init_process_group("gloo")
    for engine in engines:
        weights, mask = train(engine)
        report(**{engine: {"weights": weights, "mask": mask}})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
