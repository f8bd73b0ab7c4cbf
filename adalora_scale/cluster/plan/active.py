"""How many of a model's linear weights a token meets: of a mixture's experts only those that it is sent to."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from adalora_scale.adalora.adaptables import adaptable_of, sides
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.experts.modules import Repeated, Routed

_KEYS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts", "top_k")
"""What configs call the number of experts a token."""


class Active:
    """Elements by layer, in all and for one token.

    Args:
        model: with its experts split, with or without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._share: dict[int, float] = {}
        for module in model.modules():
            if isinstance(module, Routed | Repeated):
                share = 1.0 if isinstance(module, Repeated) else _share(model, module)
                self._share |= {id(inner): share for inner in module.modules()}

    def weights(self, module: nn.Module) -> float:
        """Return the weights of a linear layer that a token is multiplied by; a layer of experts counts by its share.

        A config that does not say how many experts a token has counts as if it had all.
        """
        return weights_of(module) * self._share.get(id(module), 1.0)

    def adapter(self, layer: AdaLoraLayer) -> float:
        """Return the elements of A and B that a token is multiplied by."""
        size = layer.matrices * layer.r * (layer.in_features + layer.out_features)
        return size * self._share.get(id(layer), 1.0)


def weights_of(module: nn.Module) -> int:
    """Return all weights of a linear layer, or of a projection of experts."""
    return adaptable_of(module).matrices(module) * math.prod(sides(module))


def _share(model: nn.Module, experts: nn.Module) -> float:
    settings: Any = getattr(experts, "config", None) or getattr(model, "config", None)
    settings = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    every = int(getattr(experts, "num_experts", 0))
    each = next((value for key in _KEYS if isinstance(value := getattr(settings, key, None), int)), every)
    return min(each / every, 1.0) if every else 1.0
