"""Which keys of DeepSpeed's configuration a run can have: DeepSpeed passes over what it does not know.

A key that another engine of DeepSpeed's reads (pipelines), that shards what adapters need whole, that changes which
rows are trained, or that no version reads is refused by name. What DeepSpeed itself fails at is one line.
"""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Iterator
from typing import Any

import torch

from adalora_scale.errors import Unsupported, UserError, nearest
from adalora_scale.messages import cause, quoted, say
from adalora_scale.process_rank import process_rank

_READ = (
    "activation_checkpointing", "aio", "autotuning", "bf16", "bfloat16", "checkpoint", "comet", "comms_logger",
    "communication_data_type", "compile", "csv_monitor", "data_types", "dataloader_drop_last", "disable_allgather",
    "disable_python_gc", "dump_state", "flops_profiler", "fp16", "gradient_accumulation_steps", "gradient_clipping",
    "gradient_predivide_factor", "log_level", "memory_breakdown", "monitor_config", "optimizer", "prescale_gradients",
    "scheduler", "steps_per_print", "tensorboard", "timers", "torch_autocast", "train_batch_size",
    "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "wandb", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip
_NOT_HERE = {
    "tensor_parallel": "it splits the matrices that adapters lie beside; shard with zero_optimization.stage 3",
    "pipeline": "DeepSpeed's pipeline engine reads it, which trains other models",
    "sequence_parallel_size": "rows are split over ranks, not their tokens",
    "expert_parallel": "experts are sharded as all weights are, by zero_optimization.stage 3",
    "hybrid_engine": "it generates text while training",
    "elasticity": "it changes the batch with the machines; resume_from_checkpoint goes on with other ranks",
    "data_efficiency": "it chooses rows of its own; the order of rows is data.train's",
    "gradient_allreduce_op": "gradients are means over ranks, as on every engine",
    "managed_gradient_accumulation": "accumulation is training.gradient_accumulation_steps",
}
"""Keys that DeepSpeed reads and a run cannot have, and why."""
_REMOVED = (
    "amp", "compression_training", "curriculum_learning", "eigenvalue", "nebula", "progressive_layer_drop",
    "quantize_training", "sparse_attention", "sparse_gradients", "use_data_before_expert_parallelism",
)  # fmt: skip
"""Keys of DeepSpeed's older versions, and of parts that a run does not use."""
_OF_STAGE_3 = ("offload_param", "zero_hpz_partition_size", "zero_quantized_weights", "memory_efficient_linear")
"""Keys of zero_optimization that other stages pass over, beside those that begin with stage3."""
_BATCH = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


def check_keys(tree: dict[str, Any]) -> None:
    """See that each key of DeepSpeed's configuration is one that a run can have, and its blocks are formed as such.

    Args:
        tree: the configuration, with a `zero_optimization` section. Keys that begin with ``_`` or ``/`` are comments.

    Raises:
        Unsupported: it asks for a part of DeepSpeed that a run does not use.
        UserError: an unknown key, or a block without what it needs.
    """
    for key, value in tree.items():
        if key in _READ or key.startswith(("_", "/")) or _off(value):
            continue
        if (reason := _NOT_HERE.get(key)) is not None:
            raise Unsupported(f"DeepSpeed's {key} is not supported: {reason}. Remove it from engine.config.")
        why = "is no longer DeepSpeed's, or not for this run" if key in _REMOVED else "is none of DeepSpeed's"
        raise UserError(f"engine.config: the key {quoted(key)} {why}; remove it.{nearest(key, _READ, cutoff=0.75)}")
    for name in ("optimizer", "scheduler"):
        block = tree.get(name)
        if block in (None, "auto"):
            continue
        if not isinstance(block, dict) or not isinstance(block.get("type"), str):
            raise UserError(f'engine.config: {name} must be {{"type": ..., "params": {{...}}}}, as DeepSpeed reads it.')
        if not isinstance(block.get("params"), dict):
            raise UserError(
                f"engine.config: {name}.params is missing; write the parameters of {block['type']}, or leave {name} "
                "out and let the training section decide."
            )
    _check_zero(tree["zero_optimization"] or {})


def _check_zero(zero: dict[str, Any]) -> None:
    for name in ("offload_param", "offload_optimizer"):
        block = zero.get(name)
        if isinstance(block, dict) and block.get("device") == "nvme" and not block.get("nvme_path"):
            raise UserError(f"engine.config: zero_optimization.{name}.device=nvme needs nvme_path, a folder there.")
    if zero.get("zenflow"):
        raise Unsupported(
            "DeepSpeed's zero_optimization.zenflow is not supported: it updates weights some steps late, of which the "
            "scores of triplets would know nothing. Remove it from engine.config."
        )
    if zero.get("stage3_use_all_reduce_for_fetch_params") is True:
        raise Unsupported(
            "DeepSpeed's zero_optimization.stage3_use_all_reduce_for_fetch_params is not supported: it fetches weights "
            "of one dtype, and adapters have another than their base. Remove it from engine.config."
        )
    secondary, ranks = zero.get("zero_hpz_partition_size", 1), os.environ.get("WORLD_SIZE")
    if isinstance(secondary, int) and ranks is not None and int(ranks) % max(secondary, 1):
        raise UserError(
            f"engine.config: zero_optimization.zero_hpz_partition_size={secondary} does not divide the number of ranks "
            f"({ranks}); it is the number of GPUs of a machine."
        )


def check_read(tree: dict[str, Any]) -> None:
    """Let the installed DeepSpeed read a configuration, before there is a model; name keys without effect.

    Raises:
        UserError: DeepSpeed does not take it.
    """
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = DeepSpeedZeroConfig.model_fields
    known = {*fields, *(field.alias for field in fields.values() if field.alias)}
    for key in (zero := tree["zero_optimization"]):
        if key not in known:
            raise UserError(f"engine.config: zero_optimization.{key} is none of DeepSpeed's.{nearest(key, known)}")
    if zero.get("stage", 0) != 3 and process_rank() == 0:
        for key, value in zero.items():
            if (key.startswith("stage3_") or key in _OF_STAGE_3) and not _off(value):
                say(f"note: zero_optimization.{key} has no effect at stage {zero.get('stage', 0)}")
    for key in ("zero_quantized_gradients", "zero_quantized_weights"):
        if zero.get(key) is True and not torch.cuda.is_available():
            raise UserError(f"engine.config: zero_optimization.{key}=true needs a GPU, and there is none; remove it.")
    stated = _stated({key: value for key, value in tree.items() if key not in _BATCH})
    with deepspeed_refusals():
        DeepSpeedConfig(stated | {"train_micro_batch_size_per_gpu": 1})


def _stated(tree: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the training section fills in."""
    return {key: _stated(v) if isinstance(v, dict) else v for key, v in tree.items() if v != "auto"}


@contextlib.contextmanager
def deepspeed_refusals() -> Iterator[None]:
    """Say in one line what DeepSpeed, or transformers for it, does not take of its configuration.

    Raises:
        UserError: it was raised in one of them, as a value that is not allowed or a package that lacks.
    """
    try:
        yield
    except (AssertionError, ValueError, TypeError, ImportError) as error:
        if not _of_deepspeed(error):
            raise
        raise UserError(f"engine.config: DeepSpeed does not take it: {_reason(error)}") from error
    except Exception as error:
        if type(error).__module__.split(".")[0] != "deepspeed":
            raise
        raise UserError(f"engine.config: {_reason(error)}") from error


def _of_deepspeed(error: Exception) -> bool:
    files = [frame.filename.replace("\\", "/") for frame in traceback.extract_tb(error.__traceback__)]
    return any("/deepspeed/" in name or name.endswith("integrations/deepspeed.py") for name in files)


def _reason(error: Exception) -> str:
    """Return the error's text in one line; of pydantic's, the first place and what is wrong there."""
    if callable(errors := getattr(error, "errors", None)):
        first = errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"].rstrip(".") + ".")))
    return cause(error, 600)


def _off(value: Any) -> bool:
    """Whether a block is switched off, or leaves things as they are."""
    if isinstance(value, dict):
        return value.get("enabled") is False or value.get("autotp_size") in (0, 1) or value.get("device") == "none"
    return value in (None, False, "auto")
