"""Triplets over this rank's spans: removing those outside a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_scale.engines.span import Sharding


@torch.no_grad()
def zero_lambda(sharding: Sharding, mask: Tensor) -> None:
    """Zero λ outside `mask` (modules · r,) in this rank's masters and in low-precision copies already made."""
    spans = [span for span in sharding.spans if span.tensor.factor == "lora_E"]
    keep = mask.to(torch.float32)
    pieces = []
    for span in spans:
        first = span.tensor.layer * span.tensor.r + span.start
        pieces.append(keep[first : first + span.weight.numel()])
    torch._foreach_mul_([span.weight for span in spans], pieces)
    sharding.publish()


@torch.no_grad()
def zero_triplets(sharding: Sharding, mask: Tensor) -> bool:
    """Zero λ, both columns and the optimizer's moments of the triplets outside `mask`.

    Returns:
        Whether something is left in the optimizer that may move the columns again: 8-bit optimizers keep codes, in
        which 0 is no zero.
    """
    may_move = False
    for span, moments in zip(sharding.spans, sharding.moments(), strict=True):
        may_move |= span.weight.numel() > 0 and not moments
        r = span.tensor.r
        columns = torch.arange(span.start, span.start + span.weight.numel(), device=span.weight.device) % r
        keep = mask[span.tensor.layer * r + columns]
        for piece in (span.weight, *moments):
            piece.mul_(keep)
    sharding.publish()
    return may_move
