"""What a user does between two steps, on this rank: freezing, loading, going on from a checkpoint of another engine.

run_ranks(…, args=[CASE:ENGINE…])
"""

import os
import sys
from pathlib import Path
from unittest import mock

os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from adalora_scale import AdaLoraConfig, RankAllocator, inject_adalora, save_adapter
from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.checkpoint.state import allocator_position, gather, scatter
from adalora_scale.checkpoint.writing import write_checkpoint
from adalora_scale.errors import UserError
from adalora_scale.export.peft_adalora import saved_values
from tests.distributed.launcher import report
from tests.distributed.workers.guard_worker import ZERO_2
from tests.toy import Toy

CONFIG = AdaLoraConfig(init_r=6, target_r=4, tinit=15, tfinal=4, deltaT=2, modules_to_save=["head"])
IDS = torch.arange(32).view(4, 8)


class Run:
    """A toy in training."""

    def __init__(self, engine):
        self.zero = engine == "zero2"
        torch.manual_seed(0)
        self.model = self.wrapped = inject_adalora(Toy(), CONFIG)
        if engine == "ddp":
            self.wrapped = DistributedDataParallel(self.model, find_unused_parameters=True)
        if engine in ("fsdp2", "hsdp"):
            replicated = {"mesh": init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))}
            options = replicated if engine == "hsdp" else {}
            for layer in (layer for block in self.model.blocks for layer in block.values()):
                fully_shard(layer, **options)
            fully_shard(self.model, **options)
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-2)
        if self.zero:
            self.wrapped, *_ = deepspeed.initialize(model=self.model, optimizer=self.optimizer, config=ZERO_2)
        target = self.wrapped if self.zero else self.optimizer
        self.allocator = RankAllocator(self.wrapped, CONFIG, total_step=20).attach(target)
        self.layer = dict(adapter_layers(self.model))["blocks.1.up"]

    def train(self, steps):
        for step in range(steps):
            torch.manual_seed(100 * step + dist.get_rank())
            loss = self.wrapped(torch.randint(0, 32, (4, 8))).square().mean()
            if self.zero:
                self.wrapped.backward(loss)
                self.wrapped.step()
            else:
                loss.backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
        return self

    @torch.no_grad()
    def logits(self):
        return self.wrapped(IDS).clone()

    def write(self, folder):
        gathered = gather(self.model, self.allocator.sharding, self.allocator)
        position = {"allocator": allocator_position(self.allocator)}
        return Checkpoint(write_checkpoint(folder, self.allocator.step, gathered, {}, position, {}))


def frozen_head(engine, folder):
    """Freeze a module trained in full; return what a checkpoint then holds beside the adapters."""
    run = Run(engine).train(2)
    run.model.head.requires_grad_(False)
    return sorted(run.train(1).write(folder).shapes("other"))


def drifted_head(engine, folder):
    """A module trained in full drifts on one replica, as faulty memory makes it."""
    run = Run(engine).train(2)
    if dist.get_rank() == 1:
        bias = run.model.head.bias
        getattr(bias, "_local_tensor", bias).data[0] += 1e-3
    run.allocator.check_consistency()


def written_back(engine, folder):
    """Write an earlier adapter's values back after an evaluation; return how far the logits are from that adapter's."""
    run = Run(engine).train(3)
    save_adapter(run.model, folder)
    dist.barrier()
    expected = run.logits()
    run.train(3).logits()
    values = saved_values(run.model, folder)
    run.logits()
    run.allocator.sharding.write(values)
    return float((run.logits() - expected).norm() / expected.norm())


def loaded_in_place(engine, folder):
    """Load a state_dict into the live model and train on; return whether the step began with it."""
    run = Run(engine).train(2)
    state = {name: value.clone() for name, value in run.model.state_dict().items()}
    run.train(2).model.load_state_dict(state)
    run.train(1)
    return max(float((p.detach() - state[name]).abs().max()) for name, p in run.model.named_parameters()) < 0.015


def other_step_counts(engine, folder):
    """Go on from a run in which one adapter took fewer steps than the others."""
    staged = Run("ddp").train(2)
    staged.layer.lora_A.requires_grad_(False)
    checkpoint = staged.train(2).write(folder)
    run = Run(engine)
    scatter(checkpoint, run.model, run.allocator.sharding, run.allocator)


def one_rank_cannot_draw(engine, folder):
    """One rank alone cannot read the adapter that it started from any more."""
    own = AdaLoraLayer.initial_factors

    def initial_factors(layer):
        if dist.get_rank() == 1 and layer.lora_A.numel() and hasattr(layer.lora_A, "placements"):
            raise UserError("the earlier adapter is gone")
        return own(layer)

    with mock.patch.object(AdaLoraLayer, "initial_factors", initial_factors):
        Run(engine)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    shared = Path(os.environ["ADALORA_RANK_DIR"])  # of the run, the same on all ranks
    for argument in sys.argv[1:]:
        case, _, name = argument.partition(":")
        try:
            outcome = globals()[case](name, shared / argument)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        report(**{argument: outcome})
        dist.barrier()
    dist.destroy_process_group()
