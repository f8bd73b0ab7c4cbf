"""Adapters that no forward uses, or only some ranks' forwards: DDP when started on ranks, one process otherwise."""

from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from tests.toy import adapters_of

STEPS, ROWS = 6, 4
CONFIG = AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=2, deltaT=1)
Named = namedtuple("Named", ["loss", "name"])
FORMS = ("tensor", "dict", "tuple", "named", "dataclass")


@dataclass
class Output:
    loss: Any
    hidden: Any


class Towers(nn.Module):
    """A layer for every row, one for rows of a kind, and one for nothing."""

    def __init__(self, form):
        super().__init__()
        self.form = form
        self.every, self.some, self.never = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        y = self.every(x)
        if bool((x[:, 0] > 0).any()):
            y = y + self.some(x) * (x[:, :1] > 0)
        loss = y.square().mean()
        return {
            "tensor": y,
            "dict": {"loss": loss, "hidden": [y]},
            "tuple": (loss, y),
            "named": Named(loss, "x"),
            "dataclass": Output(loss, y),
        }[self.form]


def loss_of(output):
    if isinstance(output, torch.Tensor):
        return output.square().mean()
    loss = output["loss"] if isinstance(output, dict) else output[0] if isinstance(output, tuple) else output.loss
    loss *= 1.0  # as a trainer scales it
    return loss


def train(form):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    inner = inject_adalora(Towers(form), CONFIG)
    batches = torch.randn(STEPS, ROWS, 6)
    batches[..., 0] = batches[..., 0].abs()
    batches[:, : ROWS // 2, 0] *= -1  # the first half, rank 0's, never uses `some`
    model = DistributedDataParallel(inner) if world > 1 else inner
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    RankAllocator(model, CONFIG, total_step=STEPS).attach(optimizer)
    for batch in batches:
        loss_of(model(batch.chunk(world)[rank])).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {f"{n}.{f}": w.detach().flatten().tolist() for n, own in adapters_of(inner).items() for f, w in own.items()}


if __name__ == "__main__":
    from tests.distributed.launcher import report

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    report(**{form: train(form) for form in FORMS})
    dist.destroy_process_group()
