"""Which engine holds a run's parameters: what was asked for, making it so, and seeing that it is so.

DDP and DeepSpeed are wrapped by accelerate when training starts. FSDP2 is applied here, before the trainer sees the
model: accelerate turns FSDP into DDP on machines without a GPU, and cannot shard a model that was loaded in pieces.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from transformers.integrations import deepspeed as hf_deepspeed

from adalora_scale.config import EngineConfig, Fsdp2Config, fsdp2_config_from_dict
from adalora_scale.errors import Unsupported, UserError

_ALONE = "one process"
_FILLED = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
_FROM_ACCELERATE = {"cpu_offload": "FSDP_OFFLOAD_PARAMS", "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD"}


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What a run asked for."""

    name: Literal["ddp", "fsdp2", "deepspeed"]
    fsdp2: Fsdp2Config = field(default_factory=Fsdp2Config)
    deepspeed: dict[str, Any] | None = None
    """DeepSpeed's configuration; None when `accelerate launch` brings it."""


def resolve_engine(config: EngineConfig) -> Engine:
    """Decide the engine from the config's section and from what `accelerate launch` put into the environment.

    Raises:
        UserError: the two disagree, no launcher started the process, or the engine's configuration cannot be used.
        Unsupported: accelerate's configuration asks for FSDP1.
    """
    launched = _accelerate_engine()
    name = config.name
    if name == "auto":
        name = launched or ("ddp" if config.config is None else "deepspeed")
    if launched is not None and launched != name:
        raise UserError(
            f"engine.name={config.name}, but accelerate's configuration asks for {launched}; make them agree."
        )
    if name == "ddp":
        if config.config is not None:
            raise UserError("engine.config says nothing to engine.name=ddp; remove it, or name another engine.")
        return Engine(name="ddp")
    if "RANK" not in os.environ:
        start = "deepspeed --num_gpus N" if name == "deepspeed" else "torchrun --nproc-per-node N"
        raise UserError(f"engine.name={name} needs a launcher, also for one process: {start} launch/train.py …")
    if name == "fsdp2":
        return Engine(name="fsdp2", fsdp2=_fsdp2_options(config, from_accelerate=launched is not None))
    if launched is not None:
        if config.config is not None:
            raise UserError("engine.config and accelerate's configuration both configure DeepSpeed; keep one.")
        return Engine(name="deepspeed")
    return Engine(name="deepspeed", deepspeed=deepspeed_config(config.config))


def shard_fsdp2(model: nn.Module, options: Fsdp2Config, *, device_type: str, bf16: bool) -> None:
    """Shard `model` in place with FSDP2: every transformer block, then what is left.

    Args:
        model: the model with its adapters, on the CPU or on this rank's device.
        options: the mesh and what is kept where.
        device_type: "cuda" or "cpu".
        bf16: gather and compute in bfloat16, reduce gradients in float32, unless `options` say otherwise.

    Raises:
        UserError: `replicate` does not divide the number of ranks.
    """
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size % options.replicate:
        raise UserError(f"engine.config.replicate={options.replicate} does not divide the {world_size} ranks.")
    if options.replicate > 1:
        shape, names = (options.replicate, world_size // options.replicate), ("replicate", "shard")
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=names)
    else:
        mesh = init_device_mesh(device_type, (world_size,))
    compute = options.param_dtype or ("bfloat16" if bf16 else None)
    reduce = options.reduce_dtype or ("float32" if compute else None)
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, compute) if compute else None,
        reduce_dtype=getattr(torch, reduce) if reduce else None,
    )
    offload = CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy()
    shared: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    for block in transformer_blocks(model):
        fully_shard(block, reshard_after_forward=options.reshard_after_forward, **shared)
    fully_shard(model, **shared)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


def join_on_cpu(timeout: timedelta) -> None:
    """Join the ranks of a run on CPU, before TrainingArguments is made.

    transformers 5.23 leaves `ddp_timeout` out there: a lost rank would hold the others for torch's own 30 minutes.
    """
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timeout)


def join_deepspeed_on_cpu(timeout: timedelta | None = None) -> None:
    """Join the ranks of a DeepSpeed run on machines without a GPU, before TrainingArguments is made.

    accelerate 1.15 names no backend there and takes every rank for a process alone. Pass
    ``accelerator_config={"use_configured_state": True}`` to TrainingArguments then.
    """
    before = os.environ.get("ACCELERATE_USE_DEEPSPEED")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend="gloo", **({} if timeout is None else {"timeout": timeout}))
    finally:
        if before is None:
            del os.environ["ACCELERATE_USE_DEEPSPEED"]


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Load models whole on the CPU although ZeRO-3 is configured; DeepSpeed partitions them when training starts.

    TrainingArguments(deepspeed=…) with stage 3 makes `from_pretrained` partition at load, with parameters of shape (0,)
    and, for a new classifier head, random numbers drawn on rank 0 alone. Loaded whole, adapters start the same on every
    rank and engine; the price is one copy of the base in host memory a rank until training starts.
    """
    reference = hf_deepspeed._hf_deepspeed_config_weak_ref
    hf_deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        hf_deepspeed._hf_deepspeed_config_weak_ref = reference


def partition_zero3(parameters: list[nn.Parameter], options: dict[str, Any]) -> None:
    """Partition parameters over the ranks as DeepSpeed ZeRO-3 does, in place, with rank 0's values.

    Args:
        parameters: whole, on this rank's device.
        options: DeepSpeed's configuration; its zero_optimization section decides where partitions are kept.

    Raises:
        Unsupported: parameters on NVMe, or quantised by DeepSpeed.
    """
    import deepspeed

    zero = {key: value for key, value in options["zero_optimization"].items() if value != "auto"}
    if (zero.get("offload_param") or {}).get("device") == "nvme" or zero.get("zero_quantized_weights"):
        raise Unsupported(
            "a base cannot be streamed with zero_optimization.offload_param on nvme or zero_quantized_weights; remove "
            "them from DeepSpeed's configuration (a 4-bit base needs neither)."
        )
    holder = nn.ParameterList(parameters)  # zero.Init takes a module with all that is below it
    deepspeed.zero.Init(
        module=holder, config_dict_or_path={"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
    )


def zero3_options() -> dict[str, Any] | None:
    """Return DeepSpeed's configuration when TrainingArguments brought one with ZeRO-3, else None."""
    return hf_deepspeed.deepspeed_config() if hf_deepspeed.is_deepspeed_zero3_enabled() else None


def is_sharded(model: nn.Module) -> bool:
    """Return whether `fully_shard` was applied to the model itself."""
    return isinstance(model, FSDPModule)


def real_engine(model: nn.Module) -> str:
    """Return what really holds `model`: one process, ddp, fsdp2, hsdp, or DeepSpeed's zero0 to zero3."""
    model = getattr(model, "_orig_mod", model)
    if type(model).__name__ == "DeepSpeedEngine":
        return f"zero{model.zero_optimization_stage()}"  # type: ignore[operator]
    if isinstance(model, DistributedDataParallel):
        return "ddp"
    for parameter in model.parameters():
        if parameter.requires_grad and isinstance(parameter, DTensor):
            return "hsdp" if any(isinstance(placement, Replicate) for placement in parameter.placements) else "fsdp2"
    return _ALONE


def check_engine(model: nn.Module, asked: str | None, *, world_size: int) -> str:
    """Compare what was asked for with what wraps the model, and return the latter.

    Args:
        model: as the trainer wrapped it for training.
        asked: "ddp", "fsdp2" or "deepspeed"; None asks for nothing but that ranks train together.
        world_size: number of ranks.

    Raises:
        UserError: they differ: the run would train something else than it says, or every rank for itself.
    """
    real = real_engine(model)
    allowed = {
        "ddp": {"ddp"} if world_size > 1 else {"ddp", _ALONE},
        "fsdp2": {"fsdp2", "hsdp"},
        "deepspeed": {"zero0", "zero1", "zero2", "zero3"},
    }
    if asked is not None and real not in allowed[asked]:
        raise UserError(
            f"engine.name={asked} was asked for, but what holds the model is: {real}. For FSDP2 use launch/train.py, "
            f"or call fully_shard on the model before making the trainer. DeepSpeed without a GPU needs "
            f"join_deepspeed_on_cpu() before TrainingArguments."
        )
    if world_size > 1 and real == _ALONE:
        raise UserError(f"{world_size} ranks were started, but nothing joins their models: each would train alone.")
    return real


def refuse_mismatches(deepspeed: Any) -> None:
    """Refuse values in DeepSpeed's configuration that differ from the `training:` section's (transformers#29348).

    Args:
        deepspeed: transformers' HfTrainerDeepSpeedConfig after it saw the arguments.

    Raises:
        UserError: naming both keys of the first such value.
    """
    for line in deepspeed.mismatches:
        found = re.fullmatch(r"- ds (?P<ds>[^=]+)=(?P<a>.*) vs hf (?P<hf>[^=]+)=(?P<b>.*)", line)
        if found is None:
            raise UserError(f"DeepSpeed's configuration disagrees with the training section: {line}")
        raise UserError(
            f"DeepSpeed's {found['ds']}={found['a']} disagrees with training.{found['hf']}={found['b']}; write "
            f'"auto" in DeepSpeed\'s configuration, or make them equal.'
        )


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: what stands in the outermost ModuleLists."""
    found: list[nn.Module] = []
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            found += [block for block in module if any(True for _ in block.parameters())]
        else:
            found += transformer_blocks(module)
    return found


def _accelerate_engine() -> Literal["fsdp2", "deepspeed"] | None:
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "deepspeed"
    return "fsdp2" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else None


def _fsdp2_options(config: EngineConfig, *, from_accelerate: bool) -> Fsdp2Config:
    if isinstance(config.config, str):
        raise UserError(f"engine.config={config.config}: FSDP2 takes keys, for example engine.config.replicate=2.")
    options = dict(config.config or {})
    if from_accelerate:
        if os.environ.get("FSDP_VERSION", "1") != "2":
            raise Unsupported("accelerate's configuration asks for FSDP1; set fsdp_version: 2 in its fsdp_config.")
        for key, variable in _FROM_ACCELERATE.items():
            value = os.environ.get(variable)
            if value is not None and key not in options:
                options[key] = value.lower() == "true"
        # The model is sharded here; accelerate would shard it again, or wrap it in DDP.
        del os.environ["ACCELERATE_USE_FSDP"]
    return fsdp2_config_from_dict(options)


def deepspeed_config(source: str | dict[str, Any] | None) -> dict[str, Any]:
    """Read DeepSpeed's configuration, and let the training section fill in what it leaves out."""
    if source is None:
        raise UserError("engine.name=deepspeed needs engine.config (or --deepspeed FILE), see configs/deepspeed/.")
    if isinstance(source, str):
        try:
            tree = json.loads(Path(source).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"engine.config={source} cannot be read: {error.strerror}.") from None
        except ValueError as error:
            raise UserError(f"engine.config={source} is not valid JSON ({error}).") from None
    else:
        tree = source
    if not isinstance(tree, dict) or "zero_optimization" not in tree:
        raise UserError("engine.config has no zero_optimization section; see configs/deepspeed/zero2.json.")
    if (tree.get("compile") or {}).get("deepcompile"):
        raise Unsupported(
            "compile.deepcompile is not supported under AdaLoRA; switch it off in DeepSpeed's configuration."
        )
    # DeepSpeed's own defaults would replace the training section's values without a word.
    return dict.fromkeys(_FILLED, "auto") | tree


def fixed_global_batch(engine: EngineConfig) -> int | None:
    """Return the global batch that DeepSpeed's configuration fixes, if it does."""
    if engine.config is None or engine.name not in ("deepspeed", "auto"):
        return None
    stated = deepspeed_config(engine.config).get("train_batch_size")
    return stated if isinstance(stated, int) else None
