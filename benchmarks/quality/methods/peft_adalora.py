"""PEFT's AdaLoRA in the trainer's loop, as its documentation has it, brought to equal parameters at its final cut.

PEFT's trainer integration never calls `update_and_allocate` (huggingface/peft issues); a callback does so after the
optimizer step, where the gradients still are. Its budget counts triplets, which move to wide matrices; at the final
allocation triplets of the lowest score go until the parameters are the budget's.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adalora_scale.config import RunConfig
from adalora_scale.training.run import Inputs
from benchmarks.quality.method import SCALE, Method, Setting, base_model, budget_of, heads_of, plain_trainer, sides_of


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
        sides, budget = sides_of(model, config), budget_of(model, config, setting.target_r)
        self._sides = sides
        init_r = max(round(1.5 * setting.target_r), setting.target_r + 1)
        options = AdaLoraConfig(
            init_r=init_r,
            target_r=setting.target_r,
            lora_alpha=round(SCALE * init_r),
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
    """Let PEFT's own cut go on, triplet by triplet, until the adapter has at most `budget` parameters."""
    cut = allocator.mask_to_budget

    def mask_to_budget(model: nn.Module, triplets: int) -> dict[str, list[bool]]:
        pattern: dict[str, list[bool]] = cut(model, triplets)
        if triplets > allocator.target_bgt:
            return pattern
        while _parameters(pattern, sides) > budget + len(sides):
            triplets -= 1
            pattern = cut(model, triplets)
        return pattern

    allocator.mask_to_budget = mask_to_budget


METHODS = (PeftAdaLora(),)
