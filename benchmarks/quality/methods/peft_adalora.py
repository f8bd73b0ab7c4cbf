"""PEFT's AdaLoRA in the trainer's loop, as its documentation has it, brought to equal parameters at its final cut.

PEFT's trainer integration never calls `update_and_allocate` (huggingface/peft issues); a callback does so after the
optimizer step, where the gradients still are. Its budget counts triplets, which move to wide matrices; at the final
allocation triplets of the lowest score go until the parameters are the budget's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adalora_scale.config import RunConfig
from adalora_scale.training.run import Inputs
from benchmarks.quality.method import Method, Setting, base_model, heads_of, plain_trainer, sides_of


class _Allocate(TrainerCallback):
    def __init__(self, model: Any) -> None:
        self._model = model

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._model.base_model.update_and_allocate(state.global_step + 1)


class PeftAdaLora(Method):
    """PEFT's AdaLoRA."""

    name, label = "peft_adalora", "PEFT AdaLoRA"

    def trainer(self, config: RunConfig, inputs: Inputs, setting: Setting) -> Trainer:
        from peft import AdaLoraConfig, get_peft_model

        model = base_model(config, inputs, setting)
        sides = sides_of(model, config)
        budget = setting.target_r * sum(side + 1 for side in sides.values())  # a triplet has a λ, too
        self._sides = sides
        init_r = max(round(1.5 * setting.target_r), setting.target_r + 1)
        options = AdaLoraConfig(
            init_r=init_r,
            target_r=setting.target_r,
            lora_alpha=setting.scale * init_r,  # type: ignore[arg-type]  # a float does
            target_modules=list(sides),
            modules_to_save=heads_of(model, config),
            tinit=round(0.1 * setting.steps),
            tfinal=round(0.3 * setting.steps),
            deltaT=1,
            orth_reg_weight=0.1,
            total_step=setting.steps,
        )
        adapted = get_peft_model(model, options)
        _bring_to(adapted.base_model.rankallocator, budget, sides)
        return plain_trainer(adapted, config, inputs, callbacks=[_Allocate(adapted)])

    def parameters(self, trainer: Trainer) -> int:
        model: Any = trainer.model
        return _parameters(model.peft_config["default"].rank_pattern, self._sides)


def _parameters(pattern: dict[str, list[bool]], sides: dict[str, int]) -> int:
    """Count what PEFT's pattern keeps; it names λ with its own prefix or without."""
    modules = (name.removeprefix("base_model.model.").partition(".lora_E")[0] for name in pattern)
    return sum(sum(row) * (sides[module] + 1) for module, row in zip(modules, pattern.values(), strict=True))


def _bring_to(allocator: Any, budget: int, sides: dict[str, int]) -> None:
    """Let PEFT's last cuts fill `budget` parameters and no more.

    Triplets are taken in the order of PEFT's own scores: its cut goes on, triplet by triplet, until the adapter fits;
    then those that follow are let in where they still fit, as our own budget in parameters does.
    """
    cut = allocator.mask_to_budget
    following = 50  # more than there are triplets dear enough to leave a gap that a later one fits

    @torch.no_grad()
    def mask_to_budget(model: nn.Module, triplets: int) -> dict[str, list[bool]]:
        if triplets > allocator.target_bgt:
            first: dict[str, list[bool]] = cut(model, triplets)
            return first
        values = {name: p for name, p in model.named_parameters() if "lora_E" in name}
        before = {name: p.clone() for name, p in values.items()}

        def best(count: int) -> dict[str, list[bool]]:
            for name, value in values.items():  # a cut sets what it prunes to zero
                value.copy_(before[name])
            kept: dict[str, list[bool]] = cut(model, count)
            return kept

        pattern = previous = best(triplets)
        while _parameters(pattern, sides) > budget:
            triplets -= 1
            pattern = previous = best(triplets)
        for count in range(triplets + 1, min(triplets + following, allocator.init_bgt)):
            larger = best(count)
            more = {}
            for name, row in pattern.items():
                states = zip(row, larger[name], previous[name], strict=True)
                more[name] = [kept or (new and not old) for kept, new, old in states]
            pattern, previous = more if _parameters(more, sides) <= budget else pattern, larger
        for name, value in values.items():
            value.copy_(before[name])
            value[~torch.tensor(pattern[name], device=value.device)] = 0
        return pattern

    allocator.mask_to_budget = mask_to_budget


METHODS = (PeftAdaLora(),)
