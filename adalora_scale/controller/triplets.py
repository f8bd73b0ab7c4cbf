"""Triplets over this rank's spans: their scores, and removing those outside a mask."""

from __future__ import annotations

import torch
from torch import Tensor

from adalora_scale.adalora.importance import add_column_sums
from adalora_scale.engines.span import Sharding


@torch.no_grad()
def triplet_scores(sharding: Sharding, sensitivity: list[Tensor], uncertainty: list[Tensor], out: Tensor) -> None:
    """Add up S_k of every triplet over all spans of all ranks; one all-reduce.

    Args:
        sharding: where the adapters are.
        sensitivity, uncertainty: Ī and Ū, one (length,) tensor a span.
        out: (modules · r,) float32 zeros, overwritten with the scores ordered by (module, k).
    """
    products = torch._foreach_mul(sensitivity, uncertainty)
    for span, product in zip(sharding.spans, products, strict=True):
        tensor = span.tensor
        first = tensor.layer * tensor.r
        add_column_sums(out[first : first + tensor.r], product / tensor.rows, start=span.start)
    sharding.all_reduce(out)


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
