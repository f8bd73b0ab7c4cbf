"""How far from a tie every choice of a mixture's routers was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from adalora_scale.experts.modules import is_experts
from adalora_scale.experts.routers import routers

_CHOICES = {torch.topk, Tensor.topk, torch.max, Tensor.max}


LEAST = 0.05
"""Smallest margin with which runs are compared: rounding is 1e-6, and PhiMoE's routers draw at random below 0.02."""


class Margins(AbstractContextManager["Margins"]):
    """While it is open, how far apart the last that is taken and the first that is left out are.

    Every choice counts that a router makes by `topk` or by `max` along a side, whatever it chooses by (logits,
    probabilities, sums over groups, noisy scores), so that nothing needs to be known of a family.

    Args:
        model: with routers, before anything wraps it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.smallest = float("inf")
        """Smallest (taken − left out) / largest |value| of all choices so far."""
        self.reached: set[int] = set()
        """Experts that a token went to, in any layer."""
        self._watch = _Watch(self._look)
        self._hooks = [
            hook
            for name in routers(model)
            for router in (model.get_submodule(name),)
            for hook in (
                router.register_forward_pre_hook(lambda *_: self._watch.__enter__() and None),
                router.register_forward_hook(lambda *_: self._watch.__exit__(None, None, None), always_call=True),
            )
        ]
        self._hooks += [m.register_forward_pre_hook(self._reach) for m in model.modules() if is_experts(m)]

    def _look(self, values: Tensor, k: int, dim: int) -> None:
        if k == values.shape[dim]:
            return
        best = values.detach().double().movedim(dim, -1)
        size = best.masked_fill(best.isinf(), 0).abs().amax(-1)  # what was masked out is no candidate
        best = best.sort(dim=-1, descending=True).values
        relative = (best[..., k - 1] - best[..., k]) / size
        self.smallest = min(self.smallest, relative.min().item())

    def _reach(self, experts: nn.Module, args: tuple[Tensor, ...]) -> None:
        if len(args) > 1:
            chosen = args[1].unique()
        else:  # every expert is given every token, times zero where it was not chosen
            chosen = args[0].detach().unflatten(0, (experts.num_experts, -1)).flatten(1).any(1).nonzero()
        self.reached |= set(chosen.flatten().tolist())

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()


class _Watch(TorchFunctionMode):
    def __init__(self, look: Callable[[Tensor, int, int], None]) -> None:
        super().__init__()
        self._see = look

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in _CHOICES and not isinstance(result, Tensor):  # not the largest element of all
            top = func in (torch.topk, Tensor.topk)
            own = dict(zip(("k", "dim") if top else ("dim",), args[1:], strict=False)) | dict(kwargs)
            self._see(args[0], own.get("k", 1), own.get("dim", -1))
        return result
