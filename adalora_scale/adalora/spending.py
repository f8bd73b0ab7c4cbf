"""What a model's budget is, what its triplets cost, and which of them it is spent on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adalora_scale.adalora.allocation import keep_best, relative_gap
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.adalora.schedule import BudgetSchedule
from adalora_scale.config import AdaLoraConfig


class Spending:
    """The budget of a run in one unit.

    In parameters a triplet costs in + out + 1, so triplets of wide matrices must be worth more to be kept and the
    adapter ends at target_r times the parameters of one triplet of every matrix, as LoRA of rank target_r has (and one
    λ a triplet). In triplets, as published, each costs one, whatever its size.

    Args:
        config: the method's options.
        layers: the adapted layers in the order of the scores.
        r: triplets of each of their matrices.
        total_step: optimizer steps of the whole run.

    Raises:
        UserError: the schedule leaves no step for pruning.
    """

    def __init__(self, config: AdaLoraConfig, layers: Sequence[AdaLoraLayer], r: int, total_step: int) -> None:
        unit = config.budget_unit
        self.each = [layer.triplet_size if unit == "params" else 1 for layer in layers for _ in range(layer.matrices)]
        """What one triplet of each matrix costs."""
        self.schedule = BudgetSchedule.from_config(config, unit, self.each, total_step)
        self._costs = torch.tensor(self.each).repeat_interleave(r)

    def spent(self, ranks: Sequence[int]) -> int:
        """Return what that many triplets of every matrix cost."""
        return sum(rank * cost for rank, cost in zip(ranks, self.each, strict=True))

    def cut(self, scores: Tensor, step: int) -> tuple[Tensor, int, float, Tensor]:
        """Return the (matrices · r,) bool mask to keep after `step`, the budget, the relative gap at the cut, and the
        scores on the CPU."""
        budget = self.schedule.budget(step)
        on_cpu = scores.cpu()  # one transfer, whatever the cut asks
        mask = keep_best(on_cpu, budget, self._costs).to(scores.device)
        return mask, budget, relative_gap(on_cpu, budget, self._costs), on_cpu
