"""LoRA, then one global threshold on the singular values of its updates: PARA (arXiv 2604.27796), no training after.

A LoRA of twice the rank is trained; of every update s B A the singular triplets are taken, and over all matrices those
of the largest singular values stay until the parameters are the budget's.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from adalora_scale.export.adapter_file import Update
from adalora_scale.export.pruning import cut_by_singular_values
from benchmarks.quality.methods.lora import Lora


class Para(Lora):
    """LoRA of twice the rank, pruned afterwards."""

    def __init__(self) -> None:
        super().__init__("para", "LoRA of 2 r, then PARA", ratio=2)

    @torch.no_grad()
    def finish(self, trainer: Trainer, budget: int) -> None:
        from peft.tuners.lora import LoraLayer

        model: Any = trainer.model
        layers: dict[str, Any] = {
            name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)
        }
        factors = {name: (m.lora_A["default"].weight, m.lora_B["default"].weight) for name, m in layers.items()}
        updates, costs = {}, {}
        for name, (a, b) in factors.items():
            scaling = torch.full((len(a),), layers[name].scaling["default"])
            updates[name] = Update(a.cpu(), scaling, b.cpu())
            costs[name] = a.shape[1] + b.shape[0]
        self._kept = 0
        for name, cut in cut_by_singular_values(updates, costs, budget).items():
            a, b = factors[name]
            rank = len(cut.update.e)
            a.zero_()
            b.zero_()
            a[:rank] = cut.update.a
            b[:, :rank] = cut.update.b * cut.update.e / layers[name].scaling["default"]
            self._kept += rank * costs[name]

    def parameters(self, trainer: Trainer) -> int:
        return self._kept


METHODS = (Para(),)
