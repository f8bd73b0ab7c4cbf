"""What TRL's SFTTrainer reads off a model, put right where a class of transformers says it otherwise."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from adalora_scale.errors import UserError
from adalora_scale.quantization.class_source import defined_beside


def name_backbone(model: nn.Module) -> None:
    """Let `base_model`, which TRL's loss runs, be what is below the head, where a class names it wrongly.

    transformers 5.23: Llama4ForCausalLM's prefix is that of the multimodal model, so that it would be its own backbone.
    """
    if getattr(model, "base_model", None) is not model:
        return
    backbones = [name for name, child in model.named_children() if isinstance(child, PreTrainedModel)]
    if len(backbones) == 1:
        model.base_model_prefix = backbones[0]


def has_own_backward(model: Any) -> bool:
    """Whether the module that defines a model's class has autograd functions: Reformer's blocks are one.

    A function whose inputs need no gradient is left out of the graph, though the layers inside it have adapters.
    """
    return any(
        isinstance(item, type) and issubclass(item, torch.autograd.Function) for item in defined_beside(model).values()
    )


def settle_router_loss(model: nn.Module, training: Any) -> None:
    """Add no loss for balanced routers to a model that has none: TRL does for every config with such a coefficient.

    Raises:
        UserError: training asks for one.
    """
    shape: Any = getattr(model, "config", None)
    if training is None or shape is None or not hasattr(text := shape.get_text_config(), "output_router_logits"):
        return
    if not hasattr(text, "num_experts") and hasattr(text, "num_local_experts"):
        text.num_experts = text.num_local_experts  # TRL 1.16 reads this name alone; Phi and Granite have the other
    if "load_balancing_loss_func" in defined_beside(model):
        return
    if getattr(training, "router_aux_loss_coef", None):
        raise UserError(
            f"training.router_aux_loss_coef is {training.router_aux_loss_coef}, but {type(model).__name__} has no loss "
            f"for its routers; remove the key."
        )
    training.router_aux_loss_coef = 0.0
