"""LoRA, then one global threshold on the singular values of its updates: PARA (arXiv 2604.27796), no training after.

A LoRA of twice the rank is trained; of every update s B A the singular triplets are taken, and over all matrices those
of the largest singular values stay until the parameters are the budget's.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer

from benchmarks.quality.methods.lora import Lora


class Para(Lora):
    """LoRA of twice the rank, pruned afterwards."""

    def __init__(self) -> None:
        super().__init__("para", "LoRA of 2 r, then PARA", ratio=2)

    @torch.no_grad()
    def finish(self, trainer: Trainer, budget: int) -> None:
        from peft.tuners.lora import LoraLayer

        layers: list[Any] = [module for module in trainer.model.modules() if isinstance(module, LoraLayer)]  # type: ignore[union-attr]
        triplets = []
        parts = []
        for index, layer in enumerate(layers):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            qb, rb = torch.linalg.qr(b)
            qa, ra = torch.linalg.qr(a.T)
            u, s, v = torch.linalg.svd(rb @ ra.T)
            parts.append((qb @ u, s, qa @ v.T))
            cost = a.shape[1] + b.shape[0]
            triplets += [(-float(value) * layer.scaling["default"], index, k, cost) for k, value in enumerate(s)]
        keep: dict[int, list[int]] = {index: [] for index in range(len(layers))}
        for _, index, k, cost in sorted(triplets):
            if cost <= budget:
                budget -= cost
                keep[index].append(k)
        self._kept = 0
        for index, (layer, (u, s, v)) in enumerate(zip(layers, parts, strict=True)):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            chosen = keep[index]
            a.zero_()
            b.zero_()
            a[: len(chosen)] = v[:, chosen].T
            b[:, : len(chosen)] = u[:, chosen] * s[chosen]
            self._kept += len(chosen) * (a.shape[1] + b.shape[0])

    def parameters(self, trainer: Trainer) -> int:
        return self._kept


METHODS = (Para(),)
