"""The one place where a model is made from its config, without memory for its weights."""

from __future__ import annotations

from typing import Any

import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import PretrainedConfig

from adalora_scale.errors import Unsupported
from adalora_scale.tasks.task import Task


def build_on_meta(
    task: Task | None,
    shape: PretrainedConfig,
    *,
    label_names: list[str] | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a task's model with its parameters on the meta device; buffers such as rotary frequencies are real.

    Args:
        task: decides the class; None takes the one that the config names first.
        shape: the model's config, which is changed: the classes' names enter it, and how the weights are stored leaves.
        label_names: names of the classes; None leaves the config's own.
        trust_remote_code: run model code that comes with the checkpoint.
        options: further keywords of `from_config`.

    Raises:
        Unsupported: the config names a class that transformers does not have.
    """
    if task is not None and label_names is not None:
        for key, value in task.label_options(label_names).items():
            setattr(shape, key, value)
    if hasattr(shape, "quantization_config"):
        del shape.quantization_config  # what the model is, not how its weights are stored
    with init_empty_weights(include_buffers=False):
        model: nn.Module
        if task is not None:
            model = task.auto_class().from_config(shape, trust_remote_code=trust_remote_code, **options)
        else:
            name = (shape.architectures or [""])[0]
            if not hasattr(transformers, name):
                raise Unsupported(f"the base's config.json names the architecture '{name}', unknown to transformers.")
            model = getattr(transformers, name)(shape)
    model.tie_weights()  # type: ignore[operator]  # registering a parameter made a copy of it on the meta device
    return model
