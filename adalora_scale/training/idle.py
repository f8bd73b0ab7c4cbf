"""Adapters that no gradient reaches: named once, after the first step."""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.engines.ranks import rank_and_size, several_ranks
from adalora_scale.messages import say


class FirstStep:
    """Watches which adapters the first step's backward reaches, whatever holds their parameters.

    Args:
        model: with AdaLoRA layers, wrapped or not.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = dict(adapter_layers(model))
        self._reached: set[str] = set()
        self._hooks = [layer.register_forward_hook(self._watching(name)) for name, layer in self._layers.items()]

    def _watching(self, name: str) -> Any:
        def reached(gradient: Tensor) -> None:
            self._reached.add(name)

        def called(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name not in self._reached and isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(reached)

        return called

    def idle(self) -> list[str]:
        """Stop watching, and return the adapters that no rank's backward reached; a collective call."""
        for hook in self._hooks:
            hook.remove()
        device = next(iter(self._layers.values())).lora_E.device
        seen = torch.tensor([name in self._reached for name in self._layers], dtype=torch.uint8, device=device)
        if several_ranks():
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        return [name for name, there in zip(self._layers, seen.tolist(), strict=True) if not there]

    def name_idle(self) -> None:
        """Stop watching, and name on rank 0 what no gradient reached; a collective call."""
        idle = self.idle()
        if idle and rank_and_size()[0] == 0:
            more = f" and {len(idle) - 1} more" if len(idle) > 1 else ""
            say(
                f"no gradient reached {len(idle)} of {len(self._layers)} adapters in the first step: "
                f"'{idle[0]}'{more}. What no batch uses is not trained; leave it out with adalora.exclude_modules.",
                to=sys.stderr,
            )
