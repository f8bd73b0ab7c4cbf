"""One run of the equivalence matrix on one engine: raw loop, real process group, real model; reports masks and weights.

run_ranks(…, args=["zero2", "clip", MODEL, OUT])
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.engines.full import full_parameter
from tests.distributed.launcher import report

STEPS, GLOBAL_BATCH, LENGTH, LR = 60, 24, 24, 5e-3
CONFIG = dict(
    init_r=6, target_r=4, lora_alpha=12, tinit=5, tfinal=15, deltaT=3, orth_reg_weight=0.3, target_modules="all-linear"
)


def token_batches():
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 512, (GLOBAL_BATCH, LENGTH), generator=generator) for _ in range(STEPS)]


def build(model_path, dtype=torch.float32):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=dtype)
    return inject_adalora(model, AdaLoraConfig(**CONFIG))


def loss_of(model, ids):
    logits = model(input_ids=ids, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def deepspeed_config(engine, variant, accumulation):
    stage = int(engine[4])
    zero = {"stage": stage}
    if engine.endswith("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = 10_000
    world = dist.get_world_size() if dist.is_initialized() else int(os.environ["WORLD_SIZE"])
    return {
        "train_micro_batch_size_per_gpu": GLOBAL_BATCH // world // accumulation,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.05 if variant == "clip" else 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        **({"bf16": {"enabled": True}} if variant == "bf16" else {}),
    }


def main(engine, variant, model_path, out):
    accumulation = 4 if variant == "accumulation" else 1
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo")
    else:
        dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = build(model_path, torch.bfloat16 if variant == "bf16" and engine.startswith("zero") else torch.float32)
    if variant == "checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    config = AdaLoraConfig(**CONFIG)
    trainable = [p for p in model.parameters() if p.requires_grad]

    if engine.startswith("zero"):
        optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=0.01)
        runner, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=deepspeed_config(engine, variant, accumulation)
        )
        allocator = RankAllocator(model, config, total_step=STEPS).attach(runner)
    elif engine in ("fsdp2", "hsdp"):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        mesh = (
            init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
            if engine == "hsdp"
            else (init_device_mesh("cpu", (world,)))
        )
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if variant == "bf16" else MixedPrecisionPolicy()
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        runner = fully_shard(model, mesh=mesh, mp_policy=policy)
        trainable = [p for p in runner.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=0.01)
        allocator = RankAllocator(runner, config, total_step=STEPS).attach(optimizer)
    else:
        runner = torch.nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=0.01)
        allocator = RankAllocator(runner, config, total_step=STEPS).attach(optimizer)

    masks = {}
    for ids in token_batches():
        mine = ids.chunk(world)[rank].chunk(accumulation)
        for i, part in enumerate(mine):
            last = i == len(mine) - 1
            if engine.startswith("zero"):
                runner.backward(loss_of(runner, part))
                runner.step()
                continue
            if engine in ("fsdp2", "hsdp"):
                runner.set_requires_gradient_sync(last)
                (loss_of(runner, part) / accumulation).backward()
            else:
                runner.require_backward_grad_sync = last
                with torch.autocast("cpu", torch.bfloat16, enabled=variant == "bf16"):
                    loss = loss_of(runner, part) / accumulation
                loss.backward()
        if not engine.startswith("zero"):
            if variant == "clip":
                torch.nn.utils.clip_grad_norm_(trainable, 0.05)
            optimizer.step()
            optimizer.zero_grad()
        allocation = allocator.last_allocation
        if allocation and allocation.step == allocator.step and str(allocation.step) not in masks:
            masks[str(allocation.step)] = {
                name.removesuffix(".lora_E"): row for name, row in allocator.rank_pattern().items()
            }
    with torch.no_grad():
        eval_loss = sum(loss_of(runner, ids.chunk(world)[rank]).item() for ids in token_batches()[:4]) / 4
    weights = {}
    for name, layer in adapter_layers(model):
        for factor in ("lora_A", "lora_E", "lora_B"):
            weights[f"{name}.{factor}"] = full_parameter(getattr(layer, factor), model).detach().float().cpu().clone()
    if rank == 0:
        torch.save(weights, out)
    report(
        masks=json.dumps(masks, sort_keys=True),
        step=allocator.step,
        eval_loss=eval_loss,
        digest=allocator.masks_digest(),
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]))
