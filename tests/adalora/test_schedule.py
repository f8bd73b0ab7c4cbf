"""The budget over time, against the paper's formula and PEFT's implementation."""

import random

import pytest

from adalora_scale.adalora.schedule import BudgetSchedule
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import UserError


def schedule_of(*, init_r=12, target_r=8, matrices=84, tinit=10, tfinal=30, total_step=100, delta_t=5):
    config = AdaLoraConfig(init_r=init_r, target_r=target_r, tinit=tinit, tfinal=tfinal, deltaT=delta_t)
    return BudgetSchedule.from_config(config, "triplets", [1] * matrices, total_step)


def test_phases():
    """Pruning one step too early or freezing one step too late shows only as worse models."""
    schedule = schedule_of()
    assert [schedule.budget(t) for t in (1, 10)] == [12 * 84] * 2
    assert schedule.budget(11) < 12 * 84
    assert schedule.budget(69) >= schedule.budget(70) == 8 * 84
    assert [schedule.budget(t) for t in (71, 100, 500)] == [8 * 84] * 3
    assert schedule.final_step == 70


def test_allocation_steps():
    """The set of steps is a contract: multiples of deltaT after tinit, and always the final step."""
    steps = [t for t in range(1, 101) if schedule_of(delta_t=7).is_allocation(t)]
    assert steps == [14, 21, 28, 35, 42, 49, 56, 63, 70]
    steps = [t for t in range(1, 101) if schedule_of(delta_t=9).is_allocation(t)]
    assert steps == [18, 27, 36, 45, 54, 63, 70]
    steps = [t for t in range(1, 101) if schedule_of(delta_t=1000).is_allocation(t)]
    assert steps == [70]
    steps = [t for t in range(1, 6) if schedule_of(tinit=0, tfinal=0, total_step=5, delta_t=1).is_allocation(t)]
    assert steps == [1, 2, 3, 4, 5]


def test_fractions_are_of_the_run():
    """The default configuration uses fractions."""
    by_fraction = schedule_of(tinit=0.1, tfinal=0.3)
    assert by_fraction == schedule_of()
    with pytest.raises(UserError, match="no step for pruning"):
        schedule_of(tinit=70, tfinal=30)


def test_budget_falls_from_init_to_target_and_equals_peft_everywhere():
    """PEFT's budget is the one users know; 200 random schedules, every step."""
    from peft.tuners.adalora.layer import RankAllocator as PeftAllocator

    rng = random.Random(0)
    compared = 0
    for _ in range(200):
        target_r = rng.randint(1, 16)
        total = rng.randint(3, 120)
        tinit = rng.randint(0, total - 2)
        tfinal = rng.randint(0, total - tinit - 1)
        schedule = schedule_of(
            init_r=target_r + rng.randint(0, 16), target_r=target_r, matrices=rng.randint(1, 600), tinit=tinit,
            tfinal=tfinal, total_step=total, delta_t=rng.randint(1, 12),
        )  # fmt: skip
        peft = object.__new__(PeftAllocator)  # its constructor wants a model; the schedule needs three numbers
        peft.init_bgt, peft.target_bgt = schedule.init_budget, schedule.target_budget
        peft.peft_config = AdaLoraConfigLike(tinit, tfinal, total, schedule.interval)
        previous = schedule.init_budget
        for t in range(1, total + 1):
            budget = schedule.budget(t)
            assert schedule.target_budget <= budget <= previous
            previous = budget
            expected, masks = peft.budget_schedule(t)
            assert budget == expected
            if t < schedule.final_step:
                assert schedule.is_allocation(t) == masks
                compared += masks
        assert previous == schedule.target_budget
    assert compared > 500


class AdaLoraConfigLike:
    def __init__(self, tinit, tfinal, total_step, delta_t):
        self.tinit, self.tfinal, self.total_step, self.deltaT = tinit, tfinal, total_step, delta_t
