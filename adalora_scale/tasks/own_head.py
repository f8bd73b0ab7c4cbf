"""The loss of a language model from its own logits, in the place where TRL computes it from the head's weight.

TRL's SFTTrainer calls `model(..., labels=labels, fused_lm_head=True)` and multiplies hidden states by the head's weight
tile by tile (`trl.trainer.utils.add_fused_lm_head`, 1.16). A head that is more than that product (a transform before
it, a cap on the logits that TRL does not know) then trains another function than the model computes. What stands here
answers the same call with the same fields from the model's own forward: right for every head, at the price of all
logits in memory at once.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from adalora_scale.errors import UserError

_ROWS = 4096
"""Positions whose entropy is computed at a time."""


def why_not_fused(model: nn.Module) -> str | None:
    """Say why TRL's fused head cannot run on a model; None where nothing is against it."""
    config: Any = model.config
    text = config.get_text_config()
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or not hasattr(head, "weight") or not hasattr(head, "bias"):
        return "the model does not say which module its output head is"
    if getattr(text, "output_router_logits", False):
        lacking = [name for name in ("num_experts", "num_experts_per_tok") if getattr(text, name, None) is None]
        if lacking:
            return f"its routers' loss needs {' and '.join(lacking)}, which {type(text).__name__} does not have"
    return None


def use_own_head(model: nn.Module, *, with_rest: bool = False) -> None:
    """Answer `fused_lm_head=True` from the model's own logits from here on; other calls stay as they are.

    Args:
        model: a causal language model on which TRL's `add_fused_lm_head` was called, or was not.
        with_rest: the model's loss has more than the cross-entropy of its logits; the rest is returned as `aux_loss`.
    """
    plain = model.forward

    @functools.wraps(plain)
    def forward(
        *args: Any,
        fused_lm_head: bool = False,
        labels: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Any = None,
        **kwargs: Any,
    ) -> Any:
        given = {"labels": labels, "shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
        if not fused_lm_head:
            return plain(*args, **kwargs, **{key: value for key, value in given.items() if value is not None})
        kwargs["use_cache"] = False
        targets = {"labels": labels, "shift_labels": shift_labels} if with_rest else {}
        outputs = plain(*args, **kwargs, **{key: value for key, value in targets.items() if value is not None})
        return _from_logits(outputs, labels, shift_labels, num_items_in_batch, with_rest=with_rest)

    model.forward = forward


def _from_logits(
    outputs: Any, labels: Tensor | None, shift_labels: Tensor | None, num_items: Any, *, with_rest: bool
) -> Any:
    """Return what TRL's fused head returns; every per-token field is zero where nothing is to be predicted."""
    from trl.trainer.utils import FusedCausalLMOutput

    logits, targets = outputs.logits, shift_labels  # (rows, length, vocabulary), (rows, length)
    if targets is None:
        if labels is None:
            raise UserError("a row without labels has no loss; give the batch labels.")
        logits, targets = logits[:, :-1], labels[:, 1:]
    targets = targets.to(logits.device)
    mask = targets != -100
    shape, vocabulary = mask.shape, logits.shape[-1]
    # Every position is scored and the ignored ones are zero: shapes do not depend on the labels, which `plan` needs.
    scored, wanted = (
        logits.float().reshape(-1, vocabulary),
        targets.reshape(-1),
    )  # (positions, vocabulary)
    log_probs = -nn.functional.cross_entropy(scored, wanted, reduction="none", ignore_index=-100).view(shape)
    with torch.no_grad():
        entropy = torch.cat([_entropy(rows) for rows in scored.split(_ROWS)]).view(shape).masked_fill(~mask, 0.0)
        is_top1 = (scored.argmax(-1) == wanted).view(shape) & mask

    count = mask.sum().clamp(min=1)
    aux_loss = getattr(outputs, "aux_loss", None)
    if with_rest:
        aux_loss = outputs.loss + log_probs.sum() / count
    return FusedCausalLMOutput(
        loss=-log_probs.sum() / (count if num_items is None else num_items),
        log_probs=log_probs,
        entropy=entropy,
        is_top1=is_top1,
        label_mask=mask,
        aux_loss=aux_loss,
    )


def _entropy(rows: Tensor) -> Tensor:
    log_probs = rows.log_softmax(-1)
    return -(log_probs.exp() * log_probs).sum(-1)
