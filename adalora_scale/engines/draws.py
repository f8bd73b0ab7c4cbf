"""Whether all ranks hold rows of one adapter: under FSDP2 no two hold the same row, and nothing else would show it.

Every rank draws whole factors and keeps its rows of them: with another seed, or an adapter loaded on some ranks only,
the rows come from different adapters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.adalora.layer import FACTORS, AdaLoraLayer
from adalora_scale.engines.ranks import agreed, everywhere, several_ranks, together
from adalora_scale.engines.span import Span
from adalora_scale.errors import UserError


@torch.no_grad()
def require_one_adapter(model: nn.Module, spans: Sequence[Span]) -> None:
    """See that the rows of all ranks are of one adapter; a collective call, before the first step.

    What a rank would draw is compared over ranks, and whether its rows still are that draw, in the first and the last
    adapted module. Rows loaded on every rank may have been drawn from anything before.

    Args:
        model: the model with AdaLoRA layers, sharded.
        spans: this rank's rows.

    Raises:
        UserError: ranks hold rows of different adapters.
    """
    if not several_ranks():
        return
    layers = {name: layer for name, layer in adapter_layers(model) if layer.r > 0}

    def look() -> tuple[str, bool | None]:
        ends = {name: layers[name].initial_factors() for name in (next(iter(layers)), list(layers)[-1])}
        return _signature(layers, ends), _as_drawn(spans, ends)

    own = together(look)
    draw, drawn = own
    said = None if drawn is None else hashlib.sha256(repr(draw if drawn else drawn).encode()).digest()
    if agreed(said):  # what every rank says is gathered only where they differ
        return
    everyone = everywhere(lambda: own)
    holders = [(rank, draw, drawn) for rank, (draw, drawn) in enumerate(everyone) if drawn is not None]
    for rank, draw, drawn in holders:
        _, first_draw, first_drawn = holders[0]
        if drawn != first_drawn or (drawn and draw != first_draw):
            raise UserError(
                f"'{spans[0].tensor.name}' on rank {rank} differs from rank {holders[0][0]} before the first step: "
                f"its rows are of another adapter; draw adapters with the same seed on every rank (torch.manual_seed "
                f"before inject_adalora, not seed + rank), or load the same adapter on every rank."
            )


def _signature(layers: dict[str, AdaLoraLayer], ends: dict[str, tuple[Tensor, Tensor, Tensor]]) -> str:
    """Return a digest of everything that a fresh adapter's values depend on."""
    digest = hashlib.sha256()
    for name, layer in layers.items():
        digest.update(
            repr((name, layer.seed, layer.init_weights, layer.init_std, layer.r, layer.earlier is None)).encode()
        )
    for factors in ends.values():
        for factor in factors:
            digest.update(factor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _as_drawn(spans: Sequence[Span], ends: dict[str, tuple[Tensor, Tensor, Tensor]]) -> bool | None:
    """Return whether this rank's rows are those that it draws; None where it has none to tell by."""
    pairs = []
    for span in spans:
        if span.tensor.module in ends and span.tensor.factor != "lora_E" and span.weight.numel():
            whole = ends[span.tensor.module][FACTORS.index(span.tensor.factor)].reshape(-1)
            pairs.append((span.weight.cpu(), whole[span.start : span.start + span.weight.numel()]))
    return all(torch.equal(*pair) for pair in pairs) if pairs else None
