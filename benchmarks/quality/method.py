"""What a method is to the harness: it adapts a base model, trains, and ends at a number of parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import Trainer, set_seed

from adalora_scale.adalora.adaptables import adaptable_of
from adalora_scale.adalora.targets import find_targets
from adalora_scale.config import AdaLoraConfig, RunConfig
from adalora_scale.experts.modules import split_all_experts
from adalora_scale.placing.model import load_model
from adalora_scale.tasks.registry import find_task
from adalora_scale.training.run import Inputs

SCALE = 2.0
"""alpha / r of every method where the adapter alone is trained, LoRA's usual one: what another scale does, another
learning rate does. Beside a new head, which shares the learning rate, the scale is tuned, too."""


@dataclass(frozen=True)
class Setting:
    """One training."""

    target_r: int
    """The budget: the parameters of LoRA of this rank on every linear layer."""
    learning_rate: float
    seed: int
    steps: int
    scale: float = SCALE
    """alpha / r."""


class Method(ABC):
    """One row of the table."""

    name: str
    label: str
    """As the table says it."""

    def section(self, setting: Setting) -> dict[str, Any]:
        """Return the run's `adalora` section; methods of others leave it alone."""
        return {"init_r": setting.target_r, "target_r": setting.target_r}

    @abstractmethod
    def trainer(self, config: RunConfig, inputs: Inputs, setting: Setting) -> Trainer:
        """Return the trainer of the adapted model."""

    def finish(self, trainer: Trainer, budget: int) -> None:  # noqa: B027 - most methods do nothing here
        """Bring the trained adapter to `budget` parameters, where the method does so after training."""

    @abstractmethod
    def parameters(self, trainer: Trainer) -> int:
        """Count the adapter's parameters as they are kept at the end, the task's head not among them."""


def base_model(config: RunConfig, inputs: Inputs, setting: Setting) -> nn.Module:
    """Load the frozen base, the same for every method of a seed, a new head included."""
    set_seed(setting.seed)
    return load_model(config, label_names=inputs.raw.label_names)


def plain_trainer(model: nn.Module, config: RunConfig, inputs: Inputs, **options: Any) -> Trainer:
    """Return the task's own trainer, without anything of ours."""
    task = find_task(config.task)
    return task.trainer_class()(
        model,
        args=inputs.arguments,
        train_dataset=inputs.data.train,
        eval_dataset=inputs.data.eval,
        processing_class=inputs.tokenizer,
        **task.trainer_options(inputs.tokenizer, inputs.raw.label_names),
        **options,
    )


def sides_of(model: nn.Module, config: RunConfig) -> dict[str, int]:
    """Return in + out of every linear layer that the methods may adapt, by name; of experts the sum over them."""
    split_all_experts(model)
    sides: dict[str, int] = {}
    for name in find_targets(model, AdaLoraConfig(modules_to_save=heads_of(model, config))):
        layer = model.get_submodule(name)
        adaptable = adaptable_of(layer)
        sides[name] = adaptable.matrices(layer) * sum(adaptable.sides(layer))
    return sides


def heads_of(model: nn.Module, config: RunConfig) -> list[str] | None:
    """Return the names of modules that are trained in full; None where there is none."""
    return find_task(config.task).new_heads(model) or None


def budget_of(model: nn.Module, config: RunConfig, target_r: int) -> int:
    """Return the parameters of LoRA of this rank on every linear layer."""
    return target_r * sum(sides_of(model, config).values())
