"""This project's method: today's default, the paper's preset, and the options that are tried."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, set_seed

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.config import RunConfig
from adalora_scale.training.run import Inputs, make_trainer
from benchmarks.quality.method import SCALE, Method, Setting


class Ours(Method):
    """One setting of the `adalora` section.

    Args:
        name, label: of the row.
        init: init_r as a multiple of target_r.
        options: the rest of the section.
    """

    def __init__(self, name: str, label: str, *, init: float = 2, **options: Any) -> None:
        self.name, self.label = name, label
        self._init, self._options = init, options

    def section(self, setting: Setting) -> dict[str, Any]:
        init_r = max(round(self._init * setting.target_r), setting.target_r + (self._init > 1))
        by_target = self._options.get("init_weights") == "lora"
        alpha = SCALE * (setting.target_r if by_target else init_r)
        return {"init_r": init_r, "target_r": setting.target_r, "lora_alpha": alpha, "deltaT": 1, **self._options}

    def trainer(self, config: RunConfig, inputs: Inputs, setting: Setting) -> Trainer:
        set_seed(setting.seed)
        return make_trainer(config, inputs)

    def parameters(self, trainer: Trainer) -> int:
        layers = dict(adapter_layers(trainer.model))  # type: ignore[arg-type]
        ranks = trainer.allocator.ranks()  # type: ignore[attr-defined]
        return sum(ranks[name] * layer.triplet_size for name, layer in layers.items())


_CANDIDATE: dict[str, Any] = {
    "init_weights": "lora",
    "score": "taylor",
    "budget_unit": "params",
    "orth_reg_weight": 0.0,
    "tinit": 0.1,
    "tfinal": 0.5,
}


def _candidate(name: str, label: str, *, init: float = 2, **changes: Any) -> Ours:
    return Ours(name, label, init=init, **_CANDIDATE | changes)


METHODS = (
    _candidate("candidate", "LoRA start, λ∂L/∂λ, gradual"),
    Ours("today", "Ī · Ū, SVD start, penalty (today's default)", init=1.5),
    Ours("paper", "paper (its score, start and penalty)", init=1.5, preset="paper", budget_unit="params"),
    _candidate("no_allocation", "LoRA start, no allocation", init=1),
    _candidate("importance", "LoRA start, Ī · Ū", score="sensitivity_uncertainty"),
    _candidate("late", "final allocation at 70 %", tfinal=0.3),
    _candidate("smooth", "final allocation at 70 %, β₁ .95", tfinal=0.3, beta1=0.95),
    _candidate("wide", "from 4 × target_r", init=4),
    _candidate("narrow", "from 1.5 × target_r", init=1.5),
    _candidate("one_shot", "pruned in one shot at half the run", tinit=0.499),
)
