"""One rank of many: the real attach, a step, an allocation and the final one, over adapters without values.

The forward, the backward and the optimizer's own arithmetic are not the allocator's, and not rehearsed: gradients and
moments lie where the optimizer would have them, and its `step` calls the hooks alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from adalora_scale.cluster.rehearsal.counted import Counted, Counts
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator

PHASES = ("attach", "step", "allocation", "final allocation")
_SCHEDULE: dict[str, Any] = {"tinit": 1, "tfinal": 1, "deltaT": 2}
_STEPS = 5
_NAMES = {2: "allocation", 3: "step", 4: "final allocation"}
"""Step 1 finds what later ones reuse."""


class Moments(Optimizer):
    """Adam's state without its arithmetic: two moments of every parameter and a count, and `step` changes nothing."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Make what Adam makes at its first step."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if not self.state[parameter]:
                moments = {name: like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                self.state[parameter] = {"step": torch.tensor(1.0), **moments}


@dataclass(frozen=True)
class Rehearsed:
    """A rank after its rehearsal, for what comes next."""

    model: nn.Module
    allocator: RankAllocator
    phases: dict[str, Counts]
    """`PHASES` → what each asked for; of a step the allocator's hooks alone."""
    by_rule: str = ""
    """What stands in for a vendor's code; empty where all is the real one."""


def like(tensor: Tensor) -> Tensor:
    """Return an uninitialised tensor of the same place and shape, without a dispatch through DTensor's rules."""
    if isinstance(tensor, DTensor):
        return DTensor(torch.empty_like(tensor._local_tensor), tensor._spec, requires_grad=False)
    return torch.empty_like(tensor)


def rehearsal_schedule(config: AdaLoraConfig) -> AdaLoraConfig:
    """Return the options with a schedule that allocates in the second step and for the last time in the fourth."""
    return replace(config, **_SCHEDULE)


def take_steps(
    model: nn.Module,
    target: Any,
    base: Optimizer,
    config: AdaLoraConfig,
    *,
    give_gradients: Callable[[], None],
    step_group: Callable[[int], None],
) -> Rehearsed:
    """Attach to `target` and call its optimizer, counting each phase.

    Args:
        model: sharded as the engine would.
        target: what `RankAllocator.attach` takes.
        base: the torch optimizer behind it.
        config: the run's options.
        give_gradients: puts gradients where the engine would have them, before each step.
        step_group: makes the engine's n-th call of the base optimizer in a step.
    """
    allocator = RankAllocator(model, rehearsal_schedule(config), total_step=_STEPS)
    hooks = _AroundHooks(base)
    with (attaching := Counted()):
        allocator.attach(target)
    hooks.close_in()
    found = {"attach": attaching.counts()}
    for number in range(1, _STEPS):
        give_gradients()
        hooks.counted = Counted()
        for group in range(allocator.sharding.calls_per_step):
            step_group(group)
        if number in _NAMES:
            found[_NAMES[number]] = hooks.counted.counts()
    return Rehearsed(model, allocator, {phase: found[phase] for phase in PHASES})


class _AroundHooks:
    """Counts while the allocator's two hooks run, and not while the optimizer does: hooks run in the order in which
    they were registered, one before and one after the allocator's."""

    def __init__(self, base: Optimizer) -> None:
        self._base = base
        self.counted = Counted()
        base.register_step_pre_hook(self._enter)
        base.register_step_post_hook(self._enter)

    def close_in(self) -> None:
        """Be called after the allocator too, which is attached by now."""
        self._base.register_step_pre_hook(self._leave)
        self._base.register_step_post_hook(self._leave)

    def _enter(self, *_: Any) -> None:
        self.counted.__enter__()

    def _leave(self, *_: Any) -> None:
        self.counted.__exit__(None, None, None)
