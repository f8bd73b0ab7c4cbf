"""PEFT's LoRA: on every linear layer, with rsLoRA's scale, and on some layers alone at the same number of parameters.

The MLP alone is the placement that PEFT's own comparison favours; attention alone is what is usual beside experts. A
whole rank seldom meets the budget there, so some matrices have one more than others (`rank_pattern`), the first layers
first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer

from adalora_scale.config import RunConfig
from adalora_scale.training.run import Inputs
from benchmarks.quality.method import Method, Setting, base_model, budget_of, heads_of, plain_trainer, sides_of

_MLP = ("gate_proj", "up_proj", "down_proj", "intermediate.dense", "output.dense", "fc1", "fc2", "c_fc")
_ATTENTION = ("attention.output.dense",)


class Lora(Method):
    """Plain LoRA."""

    def __init__(
        self, name: str = "lora", label: str = "LoRA", *, ratio: float = 1, rank_stabilised: bool = False
    ) -> None:
        self.name, self.label = name, label
        self._ratio, self._rank_stabilised = ratio, rank_stabilised

    def options(self, model: nn.Module, config: RunConfig, setting: Setting) -> dict[str, Any]:
        """Return PEFT's options that place ranks."""
        r = round(setting.target_r * self._ratio)
        return {"r": r, "lora_alpha": setting.scale * r, "target_modules": list(sides_of(model, config))}

    def trainer(self, config: RunConfig, inputs: Inputs, setting: Setting) -> Trainer:
        from peft import LoraConfig, get_peft_model

        model = base_model(config, inputs, setting)
        options = self.options(model, config, setting)
        if self._rank_stabilised:
            options["use_rslora"] = True
        lora = LoraConfig(modules_to_save=heads_of(model, config), **options)
        return plain_trainer(get_peft_model(model, lora), config, inputs)

    def parameters(self, trainer: Trainer) -> int:
        model: Any = trainer.model
        return sum(p.numel() for name, p in model.named_parameters() if "lora_" in name)


class PlacedLora(Lora):
    """LoRA on some of the linear layers, at the parameters of LoRA on all of them.

    Args:
        name, label: of the row.
        chosen: which layers, by name.
    """

    def __init__(self, name: str, label: str, chosen: Callable[[str], bool]) -> None:
        super().__init__(name, label)
        self._chosen = chosen

    def options(self, model: nn.Module, config: RunConfig, setting: Setting) -> dict[str, Any]:
        sides = {name: side for name, side in sides_of(model, config).items() if self._chosen(name)}
        budget = budget_of(model, config, setting.target_r)
        r = budget // sum(sides.values())
        left = budget - r * sum(sides.values())
        ranks = dict.fromkeys(sides, r)
        for name, side in sides.items():
            if side <= 2 * left:  # nearer to the budget with it than without
                ranks[name] += 1
                left -= side
        ranks = {name: rank for name, rank in ranks.items() if rank}
        common = max(r, 1)
        return {
            "r": common,
            "lora_alpha": setting.scale * common,
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank != common},
            "alpha_pattern": {name: setting.scale * rank for name, rank in ranks.items() if rank != common},
            "target_modules": list(ranks),
        }


def is_mlp(name: str) -> bool:
    """Whether a linear layer is of the MLP."""
    return name.endswith(_MLP) and not name.endswith(_ATTENTION)


METHODS = (
    Lora(),
    Lora("rslora", "rsLoRA", rank_stabilised=True),
    PlacedLora("lora_mlp", "LoRA, MLP only", is_mlp),
    PlacedLora("lora_attention", "LoRA, attention only", lambda name: "attn" in name),
)
