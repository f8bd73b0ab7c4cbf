"""Ranks that disagree on purpose, and models wrapped in ways that would train something else without a word."""

from __future__ import annotations

import contextlib
import os
import sys

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed

from adalora_scale import AdaLoraConfig, RankAllocator, inject_adalora
from tests.distributed.launcher import report
from tests.toy import Toy

ZERO_2 = {
    "train_micro_batch_size_per_gpu": 4,
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 100000},
    "zero_allow_untested_optimizer": True,
    "zero_force_ds_cpu_optimizer": False,
}


def wrapped(case, model, config):
    """Inject and wrap, in the order and by the engine of the case."""
    rank = dist.get_rank()
    if case == "late":
        fully_shard(model)
    torch.manual_seed(rank if case in ("seeds", "replicas", "sharded-seeds", "sharded-same") else 0)
    inject_adalora(model, config)
    if case == "sharded-same" or (case == "sharded-loaded" and rank):  # values from elsewhere, as a loader copies them
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.normal_(std=0.1)
    match case:
        case "late" | "unwrapped" | "seeds" | "then-sharded" | "then-initialized":
            return model
        case "sharded" | "sharded-seeds" | "sharded-loaded" | "sharded-same":
            return fully_shard(model)
        case "replicas":
            mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
            return fully_shard(model, mesh=mesh)
        case "head":
            for layer in (layer for block in model.blocks for layer in block.values()):
                fully_shard(layer)
            return model
        case "fsdp1":
            return FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        case _:
            return torch.nn.parallel.DistributedDataParallel(model)


def message_of(case):
    """Train a few steps as the case has it and return what it ended with."""
    rank = dist.get_rank()
    torch.manual_seed(rank if case == "base" else 0)
    model = Toy()
    config = AdaLoraConfig(
        modules_to_save=["head"] if case == "head" else None,
        init_r=6,
        target_r=4,
        tinit=0,
        tfinal=0.3,
        deltaT=2,
        beta1=0.9 if case == "config" and rank else 0.85,
    )
    try:
        runner = wrapped(case, model, config)
        held = [p for p in runner.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(held[:1] if case == "alone" and rank else held, lr=1e-2)
        allocator = RankAllocator(model if case == "join-inner" else runner, config, total_step=20).attach(optimizer)
        if case == "then-sharded":
            fully_shard(model)
        if case == "then-initialized":
            runner, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=ZERO_2)
        if case == "moved":
            torch.nn.utils.vector_to_parameters(
                torch.nn.utils.parameters_to_vector(runner.parameters()), runner.parameters()
            )
        joins = case in ("join", "join-inner")
        context = runner.join() if joins else contextlib.nullcontext()
        train(case, model, runner, optimizer, context, steps=4 + 2 * rank if joins else 4)
        allocator.check_consistency()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def train(case, model, runner, optimizer, context, *, steps):
    rank = dist.get_rank()
    with context:
        for step in range(steps):
            torch.manual_seed(100 * step + rank)
            loss = runner(torch.randint(0, 32, (4, 8))).square().mean()
            if case == "then-initialized":
                runner.backward(loss)
                runner.step()
                continue
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if case == "drift" and step == 2 and rank == 1:
                next(layer for layer in model.modules() if hasattr(layer, "lora_B")).lora_B.data[3, 1] += 1e-6


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for name in sys.argv[1:]:
        report(**{name: message_of(name)})
        dist.barrier()
    dist.destroy_process_group()
