"""A loop written by hand on a real model: DDP when started on ranks, one process otherwise.

python ddp_loop.py MODEL DATA FOLDER VARIANT...    trains each variant in turn and leaves its adapters in FOLDER
"""

import contextlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from tests.toy import adapters_of

STEPS, ROWS, LENGTH = 60, 8, 32
LR, WEIGHT_DECAY, CLIP = 5e-3, 0.01, 0.05
CONFIG = AdaLoraConfig(
    preset="paper", budget_unit="params", init_r=6, target_r=4, lora_alpha=24, tinit=5, tfinal=15, deltaT=3
)
VARIANTS = {
    "plain": {},
    "accumulation": {"accumulation": 4},
    "clipping": {"clip": CLIP},
    "checkpointing": {"checkpointing": True},
    "everything": {"accumulation": 4, "clip": CLIP, "checkpointing": True},
    "unreduced": {"wrap": False},
}


def batches_of(model_dir, data_dir):
    """(STEPS, ROWS, LENGTH) token ids of real dialogues, one global batch a step."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    rows = [json.loads(line)["messages"] for line in (Path(data_dir) / "train.jsonl").read_text().splitlines()]
    text = "\n".join(turn["content"] for row in rows for turn in row)
    return torch.tensor(tokenizer(text)["input_ids"][: STEPS * ROWS * LENGTH]).view(STEPS, ROWS, LENGTH)


def model_of(model_dir):
    """The base with fresh adapters, the same in every process."""
    torch.manual_seed(0)
    return inject_adalora(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), CONFIG)


def loss_of(model, ids):
    """Mean over all predicted tokens."""
    return F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def train(model_dir, batches, *, accumulation=1, clip=None, checkpointing=False, wrap=True):
    """Return (model, masks by step, gaps)."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    inner = model_of(model_dir)
    if checkpointing:
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inner.train()
    model = DistributedDataParallel(inner) if wrap and world_size > 1 else inner
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, weight_decay=WEIGHT_DECAY)
    allocator = RankAllocator(model, CONFIG, total_step=STEPS).attach(optimizer)
    masks, gaps = {}, []
    for ids in batches:
        parts = ids.chunk(world_size)[rank].chunk(accumulation)
        for index, part in enumerate(parts):
            waits = index < len(parts) - 1 and model is not inner
            with model.no_sync() if waits else contextlib.nullcontext():
                (loss_of(model, part) / len(parts)).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trainable, clip)
        optimizer.step()
        optimizer.zero_grad()
        last = allocator.last_allocation
        if last is not None and last.step == allocator.step:
            masks[last.step] = {name.removesuffix(".lora_E"): row for name, row in allocator.rank_pattern().items()}
            gaps.append(last.gap)
    return inner, masks, gaps


if __name__ == "__main__":
    from tests.distributed.launcher import report

    model_dir, data_dir, folder, *names = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    batches = batches_of(model_dir, data_dir)
    for name in names:
        model, masks, gaps = train(model_dir, batches, **VARIANTS[name])
        weights = {f"{n} {f}": w.detach() for n, own in adapters_of(model).items() for f, w in own.items()}
        save_file(weights, Path(folder) / f"{name}.{os.environ['RANK']}.safetensors")
        report(**{name: {"masks": {str(step): mask for step, mask in masks.items()}, "gaps": gaps}})
    dist.destroy_process_group()
