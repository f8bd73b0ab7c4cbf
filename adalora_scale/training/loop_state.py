"""What the trainers' loop itself remembers between two steps: scheduler, loss scaling, sums since the last log.

transformers keeps some of it in trainer_state.json and forgets the rest: sums that a log line averages (loss, token
accuracy) restart at a resume, so a line whose steps lie on both sides of a checkpoint would differ.
"""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.errors import Unsupported

_LOSS = "loop.loss"
_GROUP_NUMBERS = ("lr", "initial_lr", "step")
"""What changes in an optimizer's groups during training; `step` is FusedAdam's."""
_LR_KEYS = {"training.learning_rate", "training.lr_scheduler_type", "training.lr_scheduler_kwargs",
            "training.warmup_steps", "training.optim"}  # fmt: skip


def loop_state(trainer: Any, base: Optimizer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what rank 0 puts into the manifest, and this rank's own tensors.

    Args:
        trainer: a transformers or TRL trainer between two steps.
        base: the torch optimizer behind it.

    Raises:
        Unsupported: the scheduler's state is more than numbers.
    """
    groups = [{key: _number(group[key]) for key in _GROUP_NUMBERS if key in group} for group in base.param_groups]
    state: dict[str, Any] = {
        "loss_sum": trainer._total_loss_scalar,
        "last_logged": trainer._globalstep_last_logged,
        "scheduler": _plain(trainer.lr_scheduler.state_dict()),
        "param_groups": groups,
        "scaler": None,
        "loss_scaler": None,
    }
    if trainer.accelerator.scaler is not None:
        state["scaler"] = _plain(trainer.accelerator.scaler.state_dict())
    if (scaler := deepspeed_scaler(trainer)) is not None:
        state["loss_scaler"] = {key: value for key, value in vars(scaler).items() if isinstance(value, int | float)}
    if hasattr(trainer, "_total_train_tokens"):  # SFTTrainer
        state["tokens"] = trainer._total_train_tokens
        state["sums"] = {key: list(values) for key, values in trainer._metrics["train"].items()}
    return state, {_LOSS: trainer._tr_loss.detach().reshape(1).float()}


def restore_optimizer(trainer: Any, base: Optimizer, state: dict[str, Any], changed: list[str]) -> None:
    """Restore learning rates, scheduler and loss scaling; once the optimizer exists.

    Args:
        trainer, base: as in `loop_state`.
        state: what it returned.
        changed: keys that the user changed on purpose; a new learning rate or schedule must not be overwritten.
    """
    scheduler = trainer.lr_scheduler
    # DeepSpeed leaves out groups without parameters, so another engine may count them otherwise.
    if _LR_KEYS.isdisjoint(changed) and len(base.param_groups) == len(state["param_groups"]):
        scheduler.load_state_dict(state["scheduler"])
        for group, saved in zip(base.param_groups, state["param_groups"], strict=True):
            for key, value in saved.items():
                found = group.get(key)
                if isinstance(found, Tensor):
                    found.fill_(value)
                else:
                    group[key] = int(value) if key == "step" else value
    else:
        inner = getattr(scheduler, "scheduler", scheduler)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch misses the optimizer's own steps, which the checkpoint has seen
            for _ in range(state["scheduler"]["last_epoch"]):
                inner.step()
    if state["scaler"] is not None and trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(state["scaler"])
    if state["loss_scaler"] is not None and (scaler := deepspeed_scaler(trainer)) is not None:
        vars(scaler).update(state["loss_scaler"])


def restore_sums(trainer: Any, checkpoint: Checkpoint, rank: int, world_size: int) -> None:
    """Restore the sums of the log line that the checkpoint interrupted; after the loop has set them to zero."""
    state = checkpoint.manifest["loop"]
    trainer._total_loss_scalar = state["loss_sum"]
    trainer._globalstep_last_logged = state["last_logged"]
    ranks = range(checkpoint.world_size)
    losses = [loss for number in ranks if (loss := checkpoint.extra(number, _LOSS)) is not None]
    if losses:
        # A log line is the mean over ranks, so on another number of ranks each goes on from the mean.
        own = losses[rank] if world_size == checkpoint.world_size else torch.stack(losses).mean(0)
        trainer._tr_loss = own.reshape(trainer._tr_loss.shape).to(trainer._tr_loss)
    if "tokens" in state and hasattr(trainer, "_total_train_tokens"):
        trainer._total_train_tokens = state["tokens"]
        for key, values in state["sums"].items():
            trainer._metrics["train"][key] = list(values)


def deepspeed_scaler(trainer: Any) -> Any:
    """DeepSpeed's own loss scaler where it scales (fp16); bf16 and fp32 have a constant of 1."""
    zero = getattr(getattr(trainer.model_wrapped, "optimizer", None), "loss_scaler", None)
    return zero if zero is not None and hasattr(zero, "cur_scale") else None


def _number(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    state = {key: _number(value) for key, value in state.items()}
    try:
        return dict(json.loads(json.dumps(state)))
    except TypeError as error:
        raise Unsupported(
            f"the learning-rate scheduler keeps state that JSON cannot hold ({error}); use one of transformers' "
            f"lr_scheduler_type values for checkpoints that can be resumed."
        ) from None
