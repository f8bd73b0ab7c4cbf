"""Whether a run still does something, and whether what it would leave is right: numbers, trained, at its budget.

A step whose gradients are not finite changes nothing (`RankAllocator`). One such step is an accident; a run of nothing
else ends as if all were well, with the adapter it began with. Checks here are collective calls: all ranks make them at
the same places and end together.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from adalora_scale.adalora.adaptables import FACTORS
from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.checkpoint.format import checkpoints, step_of
from adalora_scale.controller import RankAllocator
from adalora_scale.engines.full import held_values
from adalora_scale.engines.ranks import everywhere, on_all_ranks, rank_and_size
from adalora_scale.errors import UserError, WrongEnd
from adalora_scale.export.whole_adapter import unwrapped
from adalora_scale.finite import is_finite

MAX_SKIPPED_STEPS = 10
"""Steps in a row without a finite gradient after which a run ends; `training.max_skipped_steps` sets another number."""
_FEW = 3
"""Bad steps in a row that may be a run's last ones."""
_SCALER_STEPS = 20
"""More of them under fp16: a loss scale that begins at 2¹⁶ halves as often before it fits, DeepSpeed's once later."""


class Soundness:
    """Follows one run.

    Args:
        model: the adapted model, wrapped or not.
        allocator: attached.
        max_skipped_steps: how many steps in a row may lack a finite gradient.
        scales_loss: whether a loss scaler (fp16) has to find its scale first.
        output_dir: where checkpoints are, for the message.
        settle: waits for one that is being written; a collective call.
    """

    def __init__(
        self,
        model: nn.Module,
        allocator: RankAllocator,
        *,
        max_skipped_steps: int,
        scales_loss: bool,
        output_dir: Path,
        settle: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._allocator, self._output_dir = unwrapped(model), allocator, output_dir
        self._limit = max_skipped_steps + _SCALER_STEPS * scales_loss
        self._limit_text = f"training.max_skipped_steps={max_skipped_steps}"
        if scales_loss:
            self._limit_text += f", and {_SCALER_STEPS} more while fp16's loss scale is found"
        self._settle = settle
        self._skipped = allocator.skipped_steps
        self.in_a_row = 0
        """Steps without a finite gradient since the last one that had one."""

    def after_step(self) -> None:
        """Count the step that has just ended.

        Raises:
            WrongEnd: too many in a row had no finite gradient.
        """
        skipped = self._allocator.skipped_steps
        self.in_a_row = self.in_a_row + skipped - self._skipped if skipped > self._skipped else 0
        self._skipped = skipped
        if self.in_a_row >= self._limit:
            self._end(
                f"training stopped at step {self._allocator.step}: the last {self.in_a_row} steps had no finite "
                f"gradient ({self._limit_text}), so that nothing was trained by them. {self._cause()}"
            )

    def require_numbers(self) -> None:
        """See that everything trained is finite, before it is written.

        Raises:
            WrongEnd: it is not.
        """
        if not all(everywhere(lambda: _finite(_trained(self._model)))):
            self._end(f"at step {self._allocator.step} weights are not numbers any more. {self._cause()}")

    def at_end(self) -> None:
        """See that the run leaves an adapter that was trained and is at its budget; after `require_numbers`.

        Raises:
            WrongEnd: it does not.
        """
        schedule, step, skipped = self._allocator.schedule, self._allocator.step, self.in_a_row
        if step and self._allocator.skipped_steps >= step:
            self._end(f"not one of {step} steps had a finite gradient: nothing was trained. {self._cause()}")
        if skipped >= _FEW and 2 * skipped > step - schedule.final_step:
            self._end(
                f"the last {skipped} of {step} steps had no finite gradient, most of those after the final allocation "
                f"(step {schedule.final_step}): training had broken down. {self._cause()}"
            )
        if not all(any(parts) for parts in zip(*everywhere(lambda: _factors_set(self._model)), strict=True)):
            self._end(
                f"after {step} steps every update is still zero: nothing was trained. Every gradient or the learning "
                f"rate was zero; see that the loss depends on the adapted modules, that rows have tokens to learn "
                f"from, and that training is longer than its warm-up."
            )
        if not self._allocator.frozen:
            self._end(
                f"training ended at step {step} of {schedule.total_step}, before the final allocation (step "
                f"{schedule.final_step}): the adapter has {self._allocator.spent:,} {schedule.unit} and never came to "
                f"its budget. Let it run to step {schedule.final_step}, or raise adalora.tfinal."
            )

    def _cause(self) -> str:
        """Name the first tensor with a value that is not finite, or say that there is none; a collective call."""
        found = [name for name in everywhere(lambda: _first_not_finite(self._model)) if name]
        if not found:
            return (
                "Every weight is finite, so loss or backward pass overflow: look at the rows of these steps, lower "
                "training.learning_rate, or compute in bfloat16 or float32."
            )
        name, trained = found[0]
        if trained:
            return f"'{name}' is not finite: lower training.learning_rate."
        return f"'{name}' of the base model is not finite: load a base that is whole."

    def _end(self, message: str) -> None:
        said = ""
        with contextlib.suppress(UserError):  # of the two errors this is the lesser
            self._settle()
        if rank_and_size()[0] == 0:
            before = self._allocator.step - self.in_a_row
            sound = [path for path in checkpoints(self._output_dir) if step_of(path) <= before]
            said = f" The last sound checkpoint is {sound[0].name}." if sound else " There is no sound checkpoint."
        raise on_all_ranks(WrongEnd(f"{message}{said}"))


def _trained(model: nn.Module) -> list[Tensor]:
    return [held_values(parameter) for parameter in model.parameters() if parameter.requires_grad]


def _finite(tensors: list[Tensor]) -> bool:
    """Whether all values are, with one read from the device; a norm over the largest value has a NaN in it, too."""
    held = [tensor for tensor in tensors if tensor.numel()]
    if not held:  # a rank may own nothing
        return True
    norms = torch._foreach_norm(held, math.inf)
    return bool(torch.isfinite(torch.stack([norm.to(norms[0].device, torch.float32) for norm in norms])).all())


def _factors_set(model: nn.Module) -> list[bool]:
    """Return, for each of A, λ and B, whether this rank holds a value of it that is not zero."""
    layers = [layer for _, layer in adapter_layers(model)]
    return [any(bool(held_values(getattr(layer, factor)).any()) for layer in layers) for factor in FACTORS]


def _first_not_finite(model: nn.Module) -> tuple[str, bool] | None:
    """Return the first tensor's name and whether it is trained: the base's first, which spoil all others."""
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[1].requires_grad):
        if not is_finite(held_values(parameter)):
            return name, parameter.requires_grad
    for name, buffer in model.named_buffers():
        if bool(buffer.isnan().any()):  # an infinite one may be meant: bounds that clip nothing
            return name, False
    return None
