"""The engines by name, and the questions that are asked of all of them."""

from __future__ import annotations

import os
from typing import Any, Literal

from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim import Optimizer

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.config import EngineConfig
from adalora_scale.engines.engine import Engine
from adalora_scale.engines.fsdp2_place import Fsdp2, Hsdp
from adalora_scale.engines.full import settle
from adalora_scale.engines.replicated import Ddp, OneProcess
from adalora_scale.engines.span import Sharding
from adalora_scale.engines.zero_place import Zero, Zero1, Zero2, Zero3
from adalora_scale.errors import Unsupported, UserError, nearest

_REGISTERED: tuple[type[Engine], ...] = (OneProcess, Ddp, Fsdp2, Hsdp, Zero1, Zero2, Zero3)
ENGINES: dict[str, type[Engine]] = {engine.real: engine for engine in _REGISTERED}
"""Real name → engine, in the order in which they are shown. Questions go from the last to the first, which takes what
nobody else wants."""
_ASKED: dict[str, type[Engine]] = {Ddp.name: Ddp, Fsdp2.name: Fsdp2, Zero.name: Zero}
"""`engine.name` → the engine that reads the section."""


def engine_for(config: EngineConfig) -> Engine:
    """Decide the engine from the config's section and from what `accelerate launch` put into the environment.

    Raises:
        UserError: the two disagree, no launcher started the process, or the engine's configuration cannot be used.
        Unsupported: accelerate's configuration asks for FSDP1; DeepSpeed's for a stage other than 1, 2 or 3.
    """
    launched = _accelerate_engine()
    name = _name(config) if launched is None or config.name != "auto" else launched
    if launched is not None and launched != name:
        raise UserError(
            f"engine.name={config.name}, but accelerate's configuration asks for {launched}; make them agree."
        )
    engine = _ASKED[name]
    if engine.start is not None and "RANK" not in os.environ:
        raise UserError(f"engine.name={name} needs a launcher, also for one process: {engine.start} launch/train.py …")
    return engine.asked(config, by_accelerate=launched is not None)


def configured(config: EngineConfig) -> Engine:
    """Return the engine that the config's section alone asks for, whatever started this process.

    Raises:
        UserError, Unsupported: as `engine_for`.
    """
    return _ASKED[_name(config)].asked(config)


def fixed_global_batch(config: EngineConfig) -> int | None:
    """Return the global batch that the engine's own configuration fixes, if it does."""
    return None if config.config is None else _ASKED[_name(config)].fixed_global_batch(config.config)


def continues(engine: Engine, saved: str) -> bool:
    """Return whether a run saved under the real name `saved` continues bit for bit, as far as the engine decides it."""
    return saved in ENGINES and ENGINES[saved].name == engine.name


def hold(model: nn.Module, target: object) -> tuple[Sharding, Optimizer]:
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
    links = _links(target)
    optimizer = links[-1]
    if not isinstance(optimizer, Optimizer):
        raise UserError(
            f"RankAllocator.attach needs a torch optimizer, a wrapper around one or a DeepSpeed engine, got "
            f"{type(target).__name__}."
        )
    engine = next(engine for engine in reversed(ENGINES.values()) if engine.recognises(model, links))
    return engine.hold(model, links), optimizer


def base_optimizer(target: object) -> Optimizer:
    """Return the torch optimizer behind a wrapper or an engine."""
    optimizer: Optimizer = _links(target)[-1]
    return optimizer


def real_engine(model: nn.Module) -> type[Engine]:
    """Return what really holds a model.

    Raises:
        Unsupported: DeepSpeed at stage 0.
    """
    inner = getattr(model, "_orig_mod", model)  # torch.compile's wrapper
    return next(engine for engine in reversed(ENGINES.values()) if engine.wraps(inner))


def is_sharded(model: nn.Module) -> bool:
    """Return whether the model itself owns its placement and the reduction of its gradients."""
    return any(engine.is_sharded(model) for engine in ENGINES.values())


def check_engine(model: nn.Module, asked: Engine | None, *, world_size: int) -> str:
    """Compare what was asked for with what wraps the model, and return the latter's name.

    Args:
        model: as the trainer wrapped it for training.
        asked: the run's engine; None asks for nothing but that ranks train together.
        world_size: number of ranks.

    Raises:
        UserError: they differ: the run would train something else than it says, or every rank for itself.
        Unsupported: as `real_engine`.
    """
    real = real_engine(model)
    if asked is not None and not asked.allows(real, world_size):
        raise UserError(
            f"engine.name={asked.name} was asked for, but what holds the model is: {real.real}. For FSDP2 use "
            f"launch/train.py, or call fully_shard on the model before making the trainer. DeepSpeed without a GPU "
            f"needs join_deepspeed_on_cpu() before TrainingArguments."
        )
    if world_size > 1 and real is OneProcess:
        raise UserError(f"{world_size} ranks were started, but nothing joins their models: each would train alone.")
    return real.real


def _links(target: Any) -> list[Any]:
    """Follow `.optimizer` from an engine or a wrapper to the optimizer that updates the weights."""
    links = [target]
    while hasattr(links[-1], "optimizer"):
        links.append(links[-1].optimizer)
    return links


def _name(config: EngineConfig) -> str:
    """Return the name that the section means: `auto` is DeepSpeed where it brings a configuration.

    Raises:
        UserError: there is no such engine.
    """
    if config.name == "auto":
        return Ddp.name if config.config is None else Zero.name
    if config.name not in _ASKED:
        known = ", ".join(("auto", *_ASKED))
        raise UserError(f"engine.name={config.name} is none of {known}.{nearest(config.name, _ASKED)}")
    return config.name


def _accelerate_engine() -> Literal["fsdp2", "deepspeed"] | None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "deepspeed"
    return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else None
