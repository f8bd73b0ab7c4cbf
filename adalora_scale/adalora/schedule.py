"""The rank budget over time."""

from __future__ import annotations

from dataclasses import dataclass

from adalora_scale.config import AdaLoraConfig


@dataclass(frozen=True)
class BudgetSchedule:
    """Triplets kept over the whole model after each optimizer step t, counted from 1.

        b(t) = init                                                   t ≤ tinit
        b(t) = floor(target + (init − target) · (1 − (t − tinit)/(end − tinit))³)
        b(t) = target                                                 t ≥ end = total_step − tfinal

    Source: arXiv 2303.10512 eq. 13 with tinit and tfinal phases; peft RankAllocator.budget_schedule.
    """

    init_budget: int
    target_budget: int
    tinit: int
    tfinal: int
    total_step: int
    interval: int
    """Steps between allocations (deltaT)."""

    @classmethod
    def from_config(cls, config: AdaLoraConfig, *, matrices: int, total_step: int) -> BudgetSchedule:
        """Build the schedule of a model with `matrices` adapted matrices.

        Raises:
            UserError: no step is left for pruning.
        """
        tinit, tfinal = config.phase_steps(total_step)
        return cls(
            init_budget=config.init_r * matrices,
            target_budget=config.target_r * matrices,
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
