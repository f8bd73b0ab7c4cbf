"""A run of the package's trainer with the float64 reference beside it, in one process or on every rank of a job.

The reference takes over the run's weights and its reduced, clipped gradients before every update, keeps its own
statistics in float64, and allocates when its own schedule says so.
"""

import os
import sys

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from adalora_scale.config import load_config
from adalora_scale.training.run import make_trainer, prepare
from adalora_scale.verify.problem import reference_options
from adalora_scale.verify.reference import FACTORS, ReferenceAdaLora
from tests.toy import adapters_of


class Shadow(TrainerCallback):
    """Its hook runs before the allocator's, so that it sees gradients before the penalty is added."""

    def __init__(self, trainer, config):
        self.trainer, self.config = trainer, config
        self.masks = {}
        self.gaps = []
        self.gradient_norms = []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        a = self.config.adalora
        options = reference_options(a, state.max_steps)
        self.adapters = adapters_of(self.trainer.model)
        self.reference = ReferenceAdaLora(self.adapters, options)
        while hasattr(optimizer, "optimizer"):  # accelerate's wrapper
            optimizer = optimizer.optimizer
        handle = optimizer.register_step_pre_hook(self.before_update)
        optimizer._optimizer_step_pre_hooks.move_to_end(handle.id, last=False)  # the allocator is attached by now

    def before_update(self, optimizer, args, kwargs):
        reference = self.reference
        reference.t += 1
        gradients = {name: {f: own[f].grad.double() for f in FACTORS} for name, own in self.adapters.items()}
        self.gradient_norms.append(sum(g.square().sum().item() for gs in gradients.values() for g in gs.values()))
        if reference.frozen:
            return
        for name, own in self.adapters.items():
            reference.adapters[name].weight = {f: own[f].detach().double().clone() for f in FACTORS}
        reference.observe(gradients)
        if reference.is_allocation(reference.t):
            reference.allocate()

    def on_step_end(self, args, state, control, **kwargs):
        allocator = self.trainer.allocator
        last = allocator.last_allocation
        if last is not None and last.step == state.global_step:
            pattern = allocator.rank_pattern()
            self.masks[last.step] = {name.removesuffix(".lora_E"): row for name, row in pattern.items()}
            self.gaps.append(last.gap)


def shadowed_run(config_file, overrides):
    """Train and return the trainer, its shadow, and what a test compares."""
    config = load_config(config_file, overrides)
    trainer = make_trainer(config, prepare(config))
    shadow = Shadow(trainer, config)
    trainer.callback_handler.callbacks.insert(0, shadow)
    trainer.train()
    seen = {
        "masks": {str(step): mask for step, mask in shadow.masks.items()},
        "reference_masks": {str(step): mask for step, mask in shadow.reference.masks.items()},
        "budgets": {str(step): budget for step, budget in shadow.reference.budgets.items()},
        "gaps": shadow.gaps,
        "gradient_norms": shadow.gradient_norms,
        "weight_sum": sum(w.double().sum().item() for own in adapters_of(trainer.model).values() for w in own.values()),
    }
    return trainer, seen


if __name__ == "__main__":
    from tests.distributed.launcher import report

    torch.set_num_threads(1)
    _, seen = shadowed_run(sys.argv[1], sys.argv[2:])
    report(world_size=int(os.environ["WORLD_SIZE"]), **seen)
    dist.destroy_process_group()
