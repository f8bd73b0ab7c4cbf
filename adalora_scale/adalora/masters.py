"""Modules that are trained in full beside the adapters: float32 weights in a model that computes in another dtype.

An update is learning rate × about 1; a bfloat16 weight w takes no step smaller than |w| / 512. At the learning rates of
fine-tuning most of a 16-bit head would never move, so what is trained is float32 whatever the base, as adapters are.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


def keep_in_float32(model: nn.Module, names: Iterable[str]) -> None:
    """Make the floating-point parameters of the named modules float32, in place, and let their forward cast.

    A module whose weights were cast gets its floating-point inputs in the dtype that its weights have during the
    forward: float32, or what FSDP2's mixed precision, autocast or DeepSpeed made of them. What it returns goes back to
    the base's dtype, unless nothing but trained modules comes after it: a head's logits, and the loss, stay float32.
    A tied weight is one parameter: it becomes float32, and is trained, wherever it is used, and all its users cast.

    Args:
        model: before it is sharded or wrapped; its parameters may be on the meta device.
        names: modules that are trained in full.
    """
    trained = {id(parameter) for name in names for parameter in model.get_submodule(name).parameters()}
    low = {id(p): p.dtype for p in model.parameters() if id(p) in trained and _is_cast(p)}
    last = max((n for n, m in enumerate(model.modules()) if {id(p) for p in _own(m)} - trained), default=-1)
    for number, module in enumerate(model.modules()):
        dtypes = [low[id(parameter)] for parameter in _own(module) if id(parameter) in low]
        if not dtypes:
            continue
        for parameter in _own(module):  # a frozen bias beside a tied weight too
            if _is_cast(parameter):
                parameter.data = parameter.data.float()  # the same object: ties, and plans that hold it, stay
        module.register_forward_pre_hook(_cast_inputs, with_kwargs=True)
        if number < last or isinstance(module, nn.Embedding):
            module.register_forward_hook(_CastBack(dtypes[0]))


def _own(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module._parameters.values() if parameter is not None]


def _is_cast(parameter: nn.Parameter) -> bool:
    return parameter.is_floating_point() and parameter.dtype != torch.float32


def _cast_inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    # Looked up now: an engine may show the forward other weights than it keeps.
    dtype = next(parameter.dtype for parameter in _own(module) if parameter.is_floating_point())

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return tuple(cast(value) for value in args), {key: cast(value) for key, value in kwargs.items()}


class _CastBack:
    """Gives what comes after a float32 module the dtype that its frozen weights are in."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # Under DeepSpeed the weights are in the engine's dtype, which need not be the one the base was loaded in.
        casts = isinstance(output, Tensor) and output.dtype == torch.float32
        return output.to(self.dtype) if casts else output
