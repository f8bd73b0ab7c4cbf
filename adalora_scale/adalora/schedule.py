"""The budget over time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from adalora_scale.config import AdaLoraConfig


@dataclass(frozen=True)
class BudgetSchedule:
    """What is spent on triplets over the whole model after each optimizer step t, counted from 1.

    Budgets are numbers of triplets, or of their parameters (`adalora.budget_unit`).

        b(t) = init                                                   t ≤ tinit
        b(t) = floor(target + (init − target) · (1 − (t − tinit)/(end − tinit))³)
        b(t) = target                                                 t ≥ end = total_step − tfinal

    Source: arXiv 2303.10512 eq. 13 with tinit and tfinal phases; peft RankAllocator.budget_schedule.
    """

    unit: str
    """What budgets count: `params` or `triplets`."""
    init_budget: int
    target_budget: int
    tinit: int
    tfinal: int
    total_step: int
    interval: int
    """Steps between allocations (deltaT)."""

    @classmethod
    def from_config(cls, config: AdaLoraConfig, unit: str, costs: Iterable[int], total_step: int) -> BudgetSchedule:
        """Build the schedule of a model.

        Args:
            config: the method's options.
            unit: what is counted, `params` or `triplets`.
            costs: of every adapted matrix, what one of its triplets costs.
            total_step: optimizer steps of the whole run.

        Raises:
            UserError: no step is left for pruning.
        """
        tinit, tfinal = config.phase_steps(total_step)
        one_of_each = sum(costs)
        return cls(
            unit=unit,
            init_budget=config.init_r * one_of_each,
            target_budget=config.target_r * one_of_each,
            tinit=tinit,
            tfinal=tfinal,
            total_step=total_step,
            interval=config.deltaT,
        )

    @property
    def final_step(self) -> int:
        """The step of the final allocation, which freezes the mask."""
        return self.total_step - self.tfinal

    def budget(self, step: int) -> int:
        """Return b(step)."""
        if step <= self.tinit:
            return self.init_budget
        if step >= self.final_step:
            return self.target_budget
        remaining = 1 - (step - self.tinit) / (self.final_step - self.tinit)
        return int((self.init_budget - self.target_budget) * remaining**3 + self.target_budget)

    def is_allocation(self, step: int) -> bool:
        """Whether triplets are re-allocated after step `step`."""
        if step == self.final_step:
            return True
        return self.tinit < step < self.final_step and step % self.interval == 0
