"""Filling a model's parameters from a checkpoint: this rank's rows of each, one tensor at a time.

Under FSDP2 a parameter is a DTensor and a rank reads, and quantises, only the blocks that cover its own rows; elsewhere
a parameter is whole. Blocks are independent, so the bytes are the same at every number of ranks; only the second level
of double quantisation needs the absmax of the whole matrix, which ranks gather.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from adalora_scale.quantization import functional
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.quantization.fill_experts import fill_experts
from adalora_scale.quantization.linear import Linear4bit
from adalora_scale.quantization.memory import CPU_PIECE, PIECE, block_pieces, give_back_freed, row_pieces
from adalora_scale.quantization.own_rows import gathered, own_rows
from adalora_scale.quantization.plan import LoadingPlan, Slot
from adalora_scale.quantization.prequantized import copy_stored, stored_nested


@torch.no_grad()
def fill(
    plan: LoadingPlan,
    slots: Iterable[Slot],
    *,
    device: torch.device,
    on_slot: Callable[[Slot], None] = lambda _: None,
    together: Callable[[Callable[[], None]], None] | None = None,
) -> None:
    """Fill the parameters of `slots`; a collective call where they are sharded.

    Args:
        plan: from `make_plan`; the modules' parameters must be materialised by now.
        slots: which of the plan's.
        device: where weights are quantised.
        on_slot: called after each.
        together: runs what a rank does by itself right before ranks meet, and lets one that fails tell the others.
    """
    for slot in slots:
        if isinstance(slot.module, ExpertLinear4bit) and slot.quantized:
            fill_experts(plan, slot, slot.module, device, together or _alone)
        elif slot.quantized:
            _fill_quantized(plan, slot, device, together or _alone)
        else:
            target = cast(Tensor, getattr(slot.module, slot.leaf))
            local, start, stop, _ = own_rows(target, slot.name)
            if target.dim() == 0:
                local.copy_(plan.checkpoint.whole(slot.source))
            else:
                added = plan.added.get(slot.name)
                stored = stop if added is None else target.shape[0] - added.shape[0]
                for first, last in row_pieces(start, min(stop, stored), local[:1].numel(), PIECE):
                    local[first - start : last - start].copy_(plan.checkpoint.rows(slot.source, first, last))
                if added is not None and stop > stored:
                    first = max(start, stored)
                    local[first - start :].copy_(added[first - stored : stop - stored])
        give_back_freed()
        on_slot(slot)


@torch.no_grad()
def draw_fresh(plan: LoadingPlan, model: nn.Module) -> list[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Draw what the checkpoint does not hold (a new head) as transformers initialises it, whole, on the CPU.

    Every rank draws the same if its generator is seeded equally, so the values do not depend on the engine.
    """
    drawn = []
    for module, meta in plan.fresh:
        whole = meta.to_empty(device="cpu")
        for part in whole.modules():
            model._init_weights(part)  # type: ignore[operator]  # PreTrainedModel's
        drawn.append((module, dict(whole.named_parameters())))
    return drawn


@torch.no_grad()
def draw_again(model: nn.Module, absent: Iterable[str]) -> None:
    """Draw once more, in place, the modules of a model in memory whose every own tensor is in `absent`.

    Building a model may draw numbers that loading throws away, and how many depends on how it is loaded: with the
    generator seeded right before this, a new head has the values that `draw_fresh` gives it.
    """
    lacking = set(absent)
    for name, module in model.named_modules():
        own = {f"{name}.{leaf}": parameter for leaf, parameter in module.named_parameters(recurse=False)}
        if own and lacking.issuperset(own):
            for parameter in own.values():
                parameter._is_hf_initialized = False  # transformers passes over what it has loaded
            model._init_weights(module)  # type: ignore[operator]  # PreTrainedModel's


@torch.no_grad()
def copy_rows(parameter: Tensor, whole: Tensor, name: str) -> None:
    """Copy this rank's rows of a whole tensor into a parameter."""
    local, start, stop, _ = own_rows(parameter, name)
    local.copy_(whole[start:stop] if whole.dim() else whole)


def _fill_quantized(
    plan: LoadingPlan, slot: Slot, device: torch.device, together: Callable[[Callable[[], None]], None]
) -> None:
    layer = cast(Linear4bit, slot.module)
    spec, checkpoint = layer.spec, plan.checkpoint
    packed, start, stop, group = own_rows(layer.weight, slot.name)
    scales, *_ = own_rows(layer.scales, slot.name)
    if slot.parts:
        copy_stored(checkpoint, slot.source, slot.parts, spec, packed, scales, start, layer.in_features)
        layer.nested.copy_(stored_nested(checkpoint, slot.name, slot.parts, spec))
        return
    absmax = torch.empty(stop - start, dtype=torch.float32, device=device)
    piece = CPU_PIECE if device.type == "cpu" else PIECE

    def read() -> None:
        for first, last in block_pieces(start, stop, spec.blocksize, layer.in_features, piece):
            weights = checkpoint.weights(
                slot.source,
                first * spec.blocksize,
                last * spec.blocksize,
                in_features=layer.in_features,
                transposed=layer.transposed,
            )
            codes, largest = functional.quantize_blocks(weights.to(device, plan.dtype), spec, slot.name)
            packed[first - start : last - start].copy_(codes)
            absmax[first - start : last - start].copy_(largest)

    (together if spec.double_quant and group is not None else _alone)(read)
    if not spec.double_quant:
        scales.copy_(functional.encode_scales(absmax, spec)[0])
        return
    every = gathered(absmax, layer.scales.shape[0], group)
    whole, nested = functional.encode_scales(every, spec)
    scales.copy_(whole[start:stop])
    layer.nested.copy_(nested)


def _alone(read: Callable[[], None]) -> None:
    read()
