"""Joining the ranks of a run on machines without a GPU, where transformers and accelerate leave something out."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist


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
    from accelerate import PartialState

    before = os.environ.get("ACCELERATE_USE_DEEPSPEED")
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    try:
        PartialState(backend="gloo", **({} if timeout is None else {"timeout": timeout}))
    finally:
        if before is None:
            del os.environ["ACCELERATE_USE_DEEPSPEED"]
