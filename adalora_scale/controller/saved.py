"""Whether a saved state of an allocator is one of this model, schedule, score and rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adalora_scale.adalora.schedule import BudgetSchedule
from adalora_scale.controller.scoring import Scoring
from adalora_scale.engines import Sharding
from adalora_scale.errors import UserError


def places(sharding: Sharding) -> Tensor:
    """Return (spans, 2) int64: where this rank's spans begin and how long they are."""
    return torch.tensor([(span.start, span.weight.numel()) for span in sharding.spans], dtype=torch.int64, device="cpu")


def require_own_state(
    state: Mapping[str, Any],
    modules: list[str],
    schedule: BudgetSchedule,
    triplets: int,
    scoring: Scoring,
    sharding: Sharding,
) -> None:
    """Refuse a state before anything of it was taken.

    Args:
        state: what `RankAllocator.state_dict` returned.
        modules, schedule, triplets, scoring, sharding: of the allocator that is to take it.

    Raises:
        UserError: the state belongs to another model, schedule, score or rank.
    """
    if state["modules"] != modules:
        raise UserError("the saved state is of another model: it adapts other modules. Resume with the same model.")
    if state["total_step"] != schedule.total_step:
        raise UserError(
            f"the saved state is of a run of {state['total_step']} steps, this one has {schedule.total_step}; "
            f"resume with the same number of steps."
        )
    unit = state.get("budget_unit", "triplets")  # before there was a choice
    if unit != schedule.unit:
        raise UserError(
            f"the saved state counts its budget in {unit}, this run in {schedule.unit}; resume with "
            f"adalora.budget_unit={unit}."
        )
    if state["mask"].numel() != triplets:
        raise UserError(
            f"the saved state has {state['mask'].numel()} triplets, this model {triplets}; resume with "
            f"the same model and adalora section."
        )
    if state["frozen"]:
        return  # the rest is of the statistics, and there are none any more
    if lost := [name for name in scoring.names() if name not in state]:
        raise UserError(
            f"the saved state has no '{lost[0]}': it is of another adalora.score than this run's "
            f"{scoring.score.config.score}; resume with the one it was saved under."
        )
    if "spans" in state and not torch.equal(state["spans"].cpu(), places(sharding)):
        raise UserError(
            "the saved state has the statistics of another rank's pieces, or of another engine's; every rank saves and "
            "loads its own state_dict(), on as many ranks (checkpoints of the trainers fit any number)."
        )
