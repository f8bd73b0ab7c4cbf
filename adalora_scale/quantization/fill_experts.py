"""Filling experts' 4-bit weights from a checkpoint: this rank's blocks, expert by expert, wherever they are cut."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from adalora_scale.quantization import functional
from adalora_scale.quantization.experts import ExpertLinear4bit, own_level
from adalora_scale.quantization.memory import CPU_PIECE, PIECE, block_pieces
from adalora_scale.quantization.own_rows import gathered, own_rows
from adalora_scale.quantization.plan import LoadingPlan, Slot
from adalora_scale.quantization.prequantized import copy_stored, stored_levels


def fill_experts(
    plan: LoadingPlan,
    slot: Slot,
    layer: ExpertLinear4bit,
    device: torch.device,
    together: Callable[[Callable[[], None]], None],
) -> None:
    """Fill weight, scales and second levels of one layer; a collective call where they are sharded.

    Args:
        plan, slot: what is read.
        layer: the slot's.
        device: where weights are quantised.
        together: as of `fill`.
    """
    spec, checkpoint = layer.spec, plan.checkpoint
    packed, start, stop, group = own_rows(layer.weight, slot.name)
    scales, *_ = own_rows(layer.scales, slot.name)
    nested, first_level, last_level, _ = own_rows(layer.weight if layer.nested is None else layer.nested, slot.name)
    if slot.parts:
        copy_stored(checkpoint, slot.source, slot.parts, spec, packed, scales, start, layer.in_features)
        if layer.nested is not None and last_level > first_level:
            nested.copy_(stored_levels(checkpoint, slot.parts, first_level, last_level))
        return
    absmax = torch.empty(stop - start, dtype=torch.float32, device=device)
    piece = CPU_PIECE if device.type == "cpu" else PIECE

    def read() -> None:
        for expert, begin, end in _by_expert(start, stop, layer.blocks):
            offset = expert * layer.blocks - start
            for first, last in block_pieces(begin, end, spec.blocksize, layer.in_features, piece):
                weights = checkpoint.expert_weights(
                    slot.source,
                    expert,
                    first * spec.blocksize,
                    last * spec.blocksize,
                    in_features=layer.in_features,
                    transposed=layer.transposed,
                )
                codes, largest = functional.quantize_blocks(weights.to(device, plan.dtype), spec, slot.name)
                packed[offset + first : offset + last].copy_(codes)
                absmax[offset + first : offset + last].copy_(largest)

    if layer.nested is None:
        read()
        scales.copy_(functional.encode_scales(absmax, spec)[0])
        return
    if group is None:
        read()
    else:
        together(read)
    # An expert's mean is over all its blocks, which other ranks may hold some of.
    every = gathered(absmax, layer.weight.shape[0], group)
    for expert in range(layer.experts):
        begin, end = expert * layer.blocks, (expert + 1) * layer.blocks
        first, last = max(begin, start), min(end, stop)
        holds_level = first_level <= expert < last_level
        if first >= last and not holds_level:
            continue
        codes, level = functional.encode_scales(every[begin:end], spec)
        if first < last:
            scales[first - start : last - start].copy_(codes[first - begin : last - begin])
        if holds_level:
            nested[expert - first_level].copy_(own_level(level))


def _by_expert(start: int, stop: int, blocks: int) -> Iterator[tuple[int, int, int]]:
    """Cut blocks start to stop of all experts into (expert, first, last) of each expert's own."""
    for expert in range(start // blocks, -(-stop // blocks)):
        yield expert, max(start - expert * blocks, 0), min(stop - expert * blocks, blocks)
