"""The lines of `scores.jsonl`: what an allocation decided on, from the vector that every rank has anyway."""

from __future__ import annotations

from typing import Any

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.adalora.schedule import BudgetSchedule
from adalora_scale.controller import RankAllocator
from adalora_scale.report.score_lines import FORMAT, encode, every_nth
from adalora_scale.training.records import JsonLines


def write_scores(lines: JsonLines, allocator: RankAllocator) -> None:
    """Append the last allocation, if it is one of those that are recorded; rank 0 calls it, once an allocation.

    Raises:
        UserError: the disk is full or the folder cannot be written any more.
    """
    allocation = allocator.last_allocation
    if allocation is None or allocation.scores is None:  # of a checkpoint: written before that was
        return
    schedule, triplets = allocator.schedule, allocation.scores.numel()
    every = every_nth(_allocations(schedule, schedule.final_step), triplets)
    if not lines.lines:
        lines.write(_header(allocator, every))
    if allocator.frozen or (_allocations(schedule, allocation.step) - 1) % every == 0:
        said = {"step": allocation.step, "budget": allocation.budget, "spent": allocator.spent, "gap": allocation.gap}
        lines.write(said | encode(allocation.scores.numpy(), allocator.mask.cpu().numpy()))


def _header(allocator: RankAllocator, every: int) -> dict[str, Any]:
    return {
        "step": 0,
        "format": FORMAT,
        "score": allocator.config.score,
        "unit": allocator.schedule.unit,
        "r": allocator.r,
        "every": every,
        "modules": allocator.matrices,
        "sides": [
            [layer.in_features, layer.out_features]
            for _, layer in adapter_layers(allocator.model)
            for _ in range(layer.matrices)
        ],
    }


def _allocations(schedule: BudgetSchedule, step: int) -> int:
    """Return how many allocations are due until `step`."""
    if step >= schedule.final_step:
        return 1 + _allocations(schedule, schedule.final_step - 1)
    return step // schedule.interval - schedule.tinit // schedule.interval
