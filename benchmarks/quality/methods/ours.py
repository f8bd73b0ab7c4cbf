"""This project's method: the default, the published method, and the options that are tried."""

from __future__ import annotations

from typing import Any

from transformers import Trainer, set_seed

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.adalora.matrices import matrix_names
from adalora_scale.config import AdaLoraConfig, RunConfig
from adalora_scale.training.run import Inputs, make_trainer
from benchmarks.quality.method import Method, Setting


class Ours(Method):
    """One setting of the `adalora` section.

    Args:
        name, label: of the row.
        init: init_r as a multiple of target_r; None: the preset's.
        options: the rest of the section.
    """

    def __init__(self, name: str, label: str, *, init: float | None = None, **options: Any) -> None:
        self.name, self.label = name, label
        self._init, self._options = init, options

    def section(self, setting: Setting) -> dict[str, Any]:
        section = {"target_r": setting.target_r, "deltaT": 1, **self._options}
        if self._init is not None:
            section["init_r"] = max(round(self._init * setting.target_r), setting.target_r + (self._init > 1))
        return section | {"lora_alpha": setting.scale / AdaLoraConfig(**section | {"lora_alpha": 1}).scaling}

    def trainer(self, config: RunConfig, inputs: Inputs, setting: Setting) -> Trainer:
        set_seed(setting.seed)
        return make_trainer(config, inputs)

    def parameters(self, trainer: Trainer) -> int:
        ranks = trainer.allocator.ranks()  # type: ignore[attr-defined]
        layers = adapter_layers(trainer.model)  # type: ignore[arg-type]
        return sum(
            ranks[matrix] * layer.triplet_size
            for name, layer in layers
            for matrix in matrix_names(name, layer.matrices)
        )


_SVD_START: dict[str, Any] = {
    "score": "sensitivity_uncertainty",
    "init_weights": "adalora",
    "orth_reg_weight": 0.1,
    "tfinal": 0.3,
}
"""The default before these tables were made: the published method with the paper's penalty left out of its score."""

METHODS = (
    Ours("default", "default (LoRA start, λ∂L/∂λ, gradual)"),
    Ours("svd_start", "Ī · Ū, SVD start, penalty", init=1.5, **_SVD_START),
    Ours("paper", "paper (its score, start and penalty)", init=1.5, preset="paper", budget_unit="params"),
    Ours("no_allocation", "no allocation", init=1),
    Ours("double", "from 2 × target_r", init=2),
    Ours("importance", "Ī · Ū", score="sensitivity_uncertainty"),
    Ours("one_shot", "pruned in one shot at half the run", tinit=0.499),
)
