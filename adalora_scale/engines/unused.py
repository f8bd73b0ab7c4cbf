"""Adapters that a forward does not use, under DDP: the tower of images, where a batch has none.

DDP waits in backward for every parameter. One that no output depends on never comes, and the gradients of its bucket
are not reduced. `find_unused_parameters=True` walks the graph of every step to find them and reduces a second buffer;
here every trained parameter is hung onto the outputs by an edge without a gradient, which costs neither.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from adalora_scale.engines.joining import ddp_around
from adalora_scale.engines.ranks import several_ranks


def take_all_part(model: nn.Module) -> None:
    """Let every trained parameter of a DDP model take part in every backward pass, in place; once a model.

    What a forward does not use gets a gradient of zeros, as it does on one process; what only some ranks' batches use
    gets their mean. Nothing happens where DDP itself looks for unused parameters.
    """
    for wrapper in ddp_around(model) if several_ranks() else []:
        if wrapper.find_unused_parameters:
            continue
        if not any(isinstance(hook, _HangOn) for hook in wrapper.module._forward_hooks.values()):
            wrapper.module.register_forward_hook(_HangOn(wrapper))


class _HangOn:
    """A forward hook of the module that DDP wraps."""

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        self._parameters = [p for p in wrapper.module.parameters() if p.requires_grad]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        # Reentrant checkpointing runs a backward of its own, in which parameters would come a second time.
        if not torch.is_grad_enabled() or torch.compiler.is_compiling() or _reenters(module):
            return output
        parameters = [p for p in self._parameters if p.requires_grad]
        if not parameters:
            return output
        # All of them: a loss may be computed from any (TRL's is not the model's own, but of the log-probabilities).
        return _mapped(output, lambda t: _Edges.apply(t, *parameters) if t.requires_grad else t)


class _Edges(torch.autograd.Function):
    """The first argument, from which backward also goes to the others, without a gradient for them."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        # A copy of a number may be changed in place, as trainers scale a loss; logits are too large to copy.
        return output.clone() if output.numel() == 1 else output.view_as(output)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], *[None] * ctx.count


def _reenters(module: nn.Module) -> bool:
    for inner in module.modules():
        if getattr(inner, "gradient_checkpointing", False):
            function = getattr(inner, "_gradient_checkpointing_func", None)
            return bool((getattr(function, "keywords", None) or {}).get("use_reentrant", True))
    return False


def _mapped(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return an output with its tensors changed, whatever holds them; other values stay."""
    if isinstance(output, Tensor):
        return change(output)
    if isinstance(output, Mapping):  # ModelOutput too: a dictionary whose keys are attributes
        for key, value in output.items():
            changed = _mapped(value, change)
            if changed is not value:
                output[key] = changed  # type: ignore[index]
        return output
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(_mapped(value, change) for value in output))
    if type(output) in (tuple, list):
        return type(output)(_mapped(value, change) for value in output)
    if dataclasses.is_dataclass(output) and not isinstance(output, type):
        for field in dataclasses.fields(output):
            value = getattr(output, field.name)
            changed = _mapped(value, change)
            if changed is not value:
                setattr(output, field.name, changed)
    return output
