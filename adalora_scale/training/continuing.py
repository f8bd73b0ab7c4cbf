"""What a run's config says about going on from a checkpoint: what must not differ, and at which ranks to build."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import TrainingArguments

from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.config import RunConfig
from adalora_scale.engines.engine import Engine
from adalora_scale.engines.registry import continues
from adalora_scale.training.arguments import check_training_section, computes_in_bf16
from adalora_scale.training.checkpointing import compact_for


def rank_fitter(
    config: RunConfig, arguments: TrainingArguments, engine: Engine, checkpoint: Checkpoint | None
) -> Callable[[nn.Module], None] | None:
    """Return what builds a freshly injected model's adapters at a checkpoint's pruned ranks, where the config wants it.

    None for a new run.
    """
    if checkpoint is None:
        return None

    def fit(model: nn.Module) -> None:
        asked = check_training_section(config).get("resume_compact")
        compact_for(checkpoint, model, asked=asked, exact=continues_exactly(checkpoint, arguments, engine))

    return fit


def continues_exactly(checkpoint: Checkpoint, arguments: TrainingArguments, engine: Engine) -> bool:
    """Return whether ranks, engine and micro-batch are those of the checkpoint, so that sums come in the same order."""
    saved = checkpoint.manifest
    batch = [arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps]
    same_engine = continues(engine, saved["engine"])
    return same_engine and saved["world_size"] == arguments.world_size and saved["micro_batch"] == batch


def run_identity(config: RunConfig) -> dict[str, Any]:
    """Return the config's keys that decide what is trained, beside those a trainer knows; paths may move."""
    tree = config.to_dict()
    moving = ("model_name_or_path", "tokenizer_name_or_path", "train", "eval", "preprocessing_num_workers")
    keys = {
        f"{section}.{key}": value
        for section in ("model", "data")
        for key, value in tree[section].items()
        if key not in moving and not key.startswith(("eval", "max_eval"))
    }
    bf16 = computes_in_bf16(check_training_section(config))
    return keys | {"task": config.task, "training.bf16": bf16}
