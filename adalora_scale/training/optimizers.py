"""`training.optim`: which of transformers' optimizers keep state that a checkpoint here can hold and give back.

A checkpoint cuts state like the weights it belongs to: one float32 number a weight, or one number a parameter. What
keeps anything else trains, but could not be resumed on other ranks, and is refused before a run begins that is to write
checkpoints. tests/training/test_optimizers.py trains, writes and resumes every optimizer that is installed.
"""

from __future__ import annotations

from typing import Any

from adalora_scale.errors import Unsupported

RESUMABLE = {
    "adamw_torch",
    "adamw_torch_fused",
    "adagrad",
    "lion_32bit",
    "paged_adamw_32bit",
    "paged_lion_32bit",
    "rmsprop",
    "rmsprop_bnb",
    "rmsprop_bnb_32bit",
    "sgd",
}

_CODES = "8-bit codes with a scale for each block of weights"
_AVERAGES = "two averages in one tensor"
_PROJECTED = "moments of projected gradients"
_UNTRIED = "state that nobody has resumed here"

NOT_RESUMABLE = {
    "adafactor": "factored moments, one number a row and one a column",
    "adalomo": "factored moments, and updates weights during the backward pass",
    "adamw_8bit": _CODES,
    "adamw_anyprecision": _UNTRIED,
    "adamw_bnb_8bit": _CODES,
    "adamw_torch_4bit": "4-bit codes with a scale for each block of weights",
    "adamw_torch_8bit": _CODES,
    "adamw_torch_npu_fused": _UNTRIED,
    "adamw_torch_xla": _UNTRIED,
    "ademamix": _AVERAGES,
    "ademamix_8bit": _CODES,
    "apollo_adamw": _PROJECTED,
    "apollo_adamw_layerwise": _PROJECTED,
    "galore_adafactor": _PROJECTED,
    "galore_adafactor_layerwise": _PROJECTED,
    "galore_adamw": _PROJECTED,
    "galore_adamw_8bit": _PROJECTED,
    "galore_adamw_8bit_layerwise": _PROJECTED,
    "galore_adamw_layerwise": _PROJECTED,
    "grokadamw": _UNTRIED,
    "lion_8bit": _CODES,
    "lomo": "nothing, and updates weights during the backward pass",
    "paged_adamw_8bit": _CODES,
    "paged_ademamix_32bit": _AVERAGES,
    "paged_ademamix_8bit": _CODES,
    "paged_lion_8bit": _CODES,
    "rmsprop_bnb_8bit": _CODES,
    "schedule_free_adamw": "a second set of weights, which it swaps for the first",
    "schedule_free_radam": "a second set of weights, which it swaps for the first",
    "schedule_free_sgd": "a second set of weights, which it swaps for the first",
    "stable_adamw": _UNTRIED,
}
"""What the optimizer keeps instead."""

_INSTEAD = {"lion_8bit": "lion_32bit", "paged_lion_8bit": "paged_lion_32bit", "paged_adamw_8bit": "paged_adamw_32bit",
            "rmsprop_bnb_8bit": "rmsprop_bnb_32bit"}  # fmt: skip


def check_optimizer(training: dict[str, Any]) -> None:
    """Refuse an optimizer whose state this run's checkpoints could not hold, before anything is loaded.

    Args:
        training: the section, converted.

    Raises:
        Unsupported: naming training.optim, and what to use instead.
    """
    name = training.get("optim")
    if name is None or not writes_checkpoints(training.get("save_strategy", "steps"), training.get("save_only_model")):
        return
    name = str(getattr(name, "value", name))
    if (kept := NOT_RESUMABLE.get(name)) is not None:
        raise Unsupported(
            f"training.optim={name} keeps {kept}, which a checkpoint cannot hold; use training.optim="
            f"{_INSTEAD.get(name, 'adamw_torch')}, or write no checkpoints to resume from "
            f"(training.save_only_model=true, or training.save_strategy=no)."
        )


def writes_checkpoints(save_strategy: Any, save_only_model: bool | None) -> bool:
    """Return whether a run with these arguments writes checkpoints to resume from, beside those a signal asks for."""
    return str(getattr(save_strategy, "value", save_strategy)) != "no" and not save_only_model
