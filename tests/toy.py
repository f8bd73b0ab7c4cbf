"""A small model made on the spot, and the bridge between a model's layers and the reference."""

from __future__ import annotations

import torch
from torch import nn

from adalora_scale.adalora.injection import adapter_layers


class Toy(nn.Module):
    """Two kinds of shapes, so that batching by shape has something to batch and something to keep apart."""

    def __init__(self, width: int = 24, wide: int = 40):
        super().__init__()
        self.embed = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(width, wide), "down": nn.Linear(wide, width, bias=False)}) for _ in range(3)
        )
        self.head = nn.Linear(width, 32)

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return self.head(x)


def adapters_of(model):
    return {name: {"A": layer.lora_A, "E": layer.lora_E, "B": layer.lora_B} for name, layer in adapter_layers(model)}


def relative_distance(model, reference) -> tuple[float, float]:
    """(over all adapters together, worst single tensor) of ‖w − w_ref‖ / ‖w_ref‖."""
    difference = total = worst = 0.0
    for name, weights in adapters_of(model).items():
        for factor, weight in weights.items():
            expected = reference.adapters[name].weight[factor]
            d = (weight.detach().double() - expected).square().sum().item()
            n = expected.square().sum().item()
            difference, total = difference + d, total + n
            if n > 0:
                worst = max(worst, (d / n) ** 0.5)
            else:
                assert d == 0
    return (difference / total) ** 0.5, worst
