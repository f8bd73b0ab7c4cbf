"""What a person sees while training: a progress bar on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from tqdm.auto import tqdm
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from adalora_scale.messages import printable, say
from adalora_scale.training.records import peak_memory


class ConsoleCallback(ProgressCallback):
    """transformers' progress bar with one short line a log instead of a whole dictionary."""

    def __init__(self, bar: bool, speed: Callable[[], float | None] = lambda: None) -> None:
        """Open no bar yet.

        Args:
            bar: whether there is one.
            speed: tokens a second over all ranks since the last log; None where it is not known.
        """
        super().__init__()
        self._bar, self._speed = bar, speed
        self._begun: tuple[float, int] | None = None
        self._warm = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, and begin to count time."""
        self._begun, self._warm = (time.perf_counter(), state.global_step), False
        if self._bar:
            super().on_train_begin(args, state, control, **kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if not self._warm:  # a first step compiles and fills caches
            self._begun, self._warm = (time.perf_counter(), state.global_step), True
        if self._bar:
            super().on_step_end(args, state, control, **kwargs)

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        """Move the evaluation's bar."""
        if self._bar:
            super().on_prediction_step(args, state, control, eval_dataloader, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the step's figures."""
        line = describe(state, logs or {})
        if line and "loss" in (logs or {}):
            line += "  " + "  ".join(self._pace(state))
        if line and state.is_world_process_zero:
            if self._bar:
                tqdm.write(printable(line))
            else:
                say(line)

    def _pace(self, state: TrainerState) -> list[str]:
        """Return tokens a second, peak memory and the time left, evaluations and checkpoints as often as until now."""
        parts = [] if (speed := self._speed()) is None else [f"{speed:,.0f} tokens/s"]
        peak = peak_memory()
        parts.append(f"memory {peak.get('device_bytes', peak['resident_bytes']) / 2**30:.1f} GiB")
        if self._begun is not None and self._begun[1] < state.global_step < state.max_steps:
            since, step = self._begun
            left = (time.perf_counter() - since) / (state.global_step - step) * (state.max_steps - state.global_step)
            parts.append(f"{timedelta(seconds=round(left))} left")
        return parts

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar:
            super().on_train_end(args, state, control, **kwargs)


def use_console(trainer: Trainer) -> None:
    """Replace the trainer's own printing; `disable_tqdm` decides between bar and lines."""
    trainer.pop_callback(PrinterCallback)
    trainer.pop_callback(ProgressCallback)
    ours = getattr(trainer, "adalora_callback", None)  # called before this one: it was there first
    bar = not trainer.args.disable_tqdm
    trainer.add_callback(ConsoleCallback(bar, speed=lambda: getattr(ours, "tokens_per_second", None)))


def describe(state: TrainerState, logs: dict[str, Any]) -> str:
    """Return one line about a training or evaluation log, or nothing for logs that only carry run times."""
    place = f"step {state.global_step}/{state.max_steps}"
    if "loss" in logs:
        parts = [f"loss {logs['loss']:.4f}"]
        if "grad_norm" in logs:
            parts.append(f"grad norm {float(logs['grad_norm']):.3g}")
        if "learning_rate" in logs:
            parts.append(f"lr {logs['learning_rate']:.2e}")
        if "adalora/budget" in logs:
            low, high = logs["adalora/rank_min"], logs["adalora/rank_max"]
            parts.append(f"triplets {logs['adalora/rank_total']} (ranks {low} to {high})")
        if logs.get("adalora/skipped_steps"):
            parts.append(f"{logs['adalora/skipped_steps']} non-finite steps skipped")
        return f"{place}  " + "  ".join(parts)
    figures = [
        f"{key} {logs[key]:.4f}" for key in ("eval_loss", "eval_accuracy") if isinstance(logs.get(key), int | float)
    ]
    return f"{place}  " + "  ".join(figures) if figures else ""
