"""Where each engine keeps its pieces of the adapter: one `Sharding` an engine, chosen once at attach.

Everything the controller does is the same on every engine; a `Sharding` only says which pieces this rank's optimizer
owns, where their reduced gradients are, and how to sum a small buffer over the ranks that hold different pieces.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.engines.fsdp2 import DTensorSharding
from adalora_scale.engines.full import settle
from adalora_scale.engines.pieces import Piece, PieceState, trained_parameters, whole_shape
from adalora_scale.engines.replicated import ReplicatedSharding
from adalora_scale.engines.span import AdapterTensor, Sharding, Span, adapter_tensors
from adalora_scale.engines.zero import ZeroSharding
from adalora_scale.errors import Unsupported, UserError

__all__ = [
    "AdapterTensor",
    "Piece",
    "PieceState",
    "Sharding",
    "Span",
    "adapter_tensors",
    "base_optimizer",
    "sharding_for",
    "trained_parameters",
    "whole_shape",
]


def sharding_for(model: nn.Module, target: object) -> tuple[Sharding, Optimizer]:
    """Choose the sharding of `model`'s adapters as the optimizer behind `target` holds them.

    Args:
        model: the model with AdaLoRA layers, wrapped or not.
        target: a torch optimizer, a wrapper around one (accelerate's, DeepSpeed's), or a DeepSpeed engine.

    Returns:
        The sharding and the torch optimizer whose `step` updates the weights.

    Raises:
        UserError: the model has no adapters, or the optimizer does not hold them.
        Unsupported: the engine that holds the parameters is not supported.
    """
    settle(model)
    if not any(True for _ in adapter_layers(model)):
        raise UserError("the model has no AdaLoRA layers; call inject_adalora(model, config) before attach.")
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise Unsupported("FullyShardedDataParallel (FSDP1) is not supported; shard with fully_shard (FSDP2) instead.")
    chain = _chain(target)
    optimizer = chain[-1]
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"RankAllocator.attach needs a torch optimizer, a wrapper around one or a DeepSpeed engine, got "
            f"{type(target).__name__}."
        )
    engine = next((link for link in chain if type(link).__name__ == "DeepSpeedEngine"), None)
    zero = [link for link in chain[:-1] if _is_deepspeed(link) and link is not engine]
    if zero:
        return ZeroSharding(model, zero[-1], engine), optimizer
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return DTensorSharding(model, optimizer), optimizer
    return ReplicatedSharding(model, optimizer), optimizer


def base_optimizer(target: object) -> Optimizer:
    """Return the torch optimizer behind a wrapper or an engine."""
    optimizer: Optimizer = _chain(target)[-1]
    return optimizer


def _chain(target: Any) -> list[Any]:
    """Follow `.optimizer` from an engine or a wrapper to the optimizer that updates the weights."""
    chain = [target]
    while hasattr(chain[-1], "optimizer"):
        chain.append(chain[-1].optimizer)
    return chain


def _is_deepspeed(link: Any) -> bool:
    return type(link).__module__.split(".")[0] == "deepspeed"
