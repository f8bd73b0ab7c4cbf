"""AdaLoRA in anyone's transformers or TRL trainer: `Trainer(..., callbacks=[AdaLoraCallback()])`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adalora_scale.adalora.injection import injected_module, injection_of
from adalora_scale.controller import RankAllocator
from adalora_scale.engines.ranks import rank_and_size, together
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.peft_adalora import gather_adapter, write_gathered
from adalora_scale.export.stock_saving import is_readable, save_adapter_alone
from adalora_scale.export.whole_adapter import WholeAdapter, unwrapped
from adalora_scale.messages import say
from adalora_scale.report.names import METRICS_NAME, RANKS_NAME, SCORES_NAME
from adalora_scale.training.idle import FirstStep
from adalora_scale.training.lease import Lease, take
from adalora_scale.training.records import JsonLines
from adalora_scale.training.reporting import leave_report
from adalora_scale.training.score_records import write_scores
from adalora_scale.training.soundness import MAX_SKIPPED_STEPS, Soundness
from adalora_scale.training.stock_checkpoints import name_unwritten, refuse_base_in_files


class AdaLoraCallback(TrainerCallback):
    """Attach a `RankAllocator` when training starts, write metrics and ranks, and save the adapter at the end.

    The model must have been prepared with `inject_adalora(model, config)` before the trainer was made. Files go to
    `args.output_dir`: `metrics.jsonl`, `ranks.jsonl`, `scores.jsonl`, and at the end `adapter_config.json`,
    `adapter_model.safetensors` and `report.html`. `trainer.save_model` and the trainer's checkpoints write the adapter
    too, in place of the model; what would write the frozen base as well is refused when training starts. Training that
    would leave nothing right (no numbers, nothing trained, stopped before the final allocation) raises `WrongEnd`, and
    no adapter is written.
    """

    def __init__(self, *, saves_checkpoints: bool = True, max_skipped_steps: int = MAX_SKIPPED_STEPS) -> None:
        """Make a callback.

        Args:
            saves_checkpoints: False in a trainer whose checkpoints hold the adapter already.
            max_skipped_steps: steps in a row without a finite gradient after which training ends (`WrongEnd`).
        """
        self._saves_checkpoints = saves_checkpoints
        self.reports = True
        """Whether a report is written when training ends; False where who called training does that later."""
        self.max_skipped_steps = max_skipped_steps
        self._soundness: Soundness | None = None
        self._whole: tuple[int, WholeAdapter | None] | None = None
        """The step at which ranks put the adapter together for the trainer to write, and on rank 0 the adapter."""
        self.allocator: RankAllocator | None = None
        """From the moment that training begins."""
        self.records: dict[str, JsonLines] = {}
        """The files of lines that rank 0 writes."""
        self.lease: Lease | None = None
        """Rank 0's hold on output_dir, where the trainer took it; else it is taken while training lasts."""
        self._own_lease: Lease | None = None
        self.settle: Callable[[], None] = lambda: None
        """Waits for a checkpoint that is being written, where the trainer does so while training goes on."""
        self.kept_lines: dict[str, int] | None = None
        """Of a continued run: how many lines of each of the files stay."""
        self._attached_early = False
        self._first_step: FirstStep | None = None
        self._guarded_step = -1
        self._last_written = 0
        self._clock = time.perf_counter()
        self._tokens = 0.0
        self.tokens_per_second: float | None = None
        """Over all ranks, between the last two logs of a loss."""

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Let the trainer's saving write the adapter, before training too."""
        model: nn.Module = kwargs["model"]
        if (root := injected_module(model)) is not None:
            save_adapter_alone(root, self._ready)
            if self._saves_checkpoints:
                refuse_base_in_files(args, root)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the allocator for `state.max_steps` steps and hook it into the optimizer."""
        model: nn.Module = kwargs["model"]
        if injection_of(model) is None:
            raise UserError(
                "AdaLoraCallback found no AdaLoRA layers; call inject_adalora(model, config) before making the trainer."
            )
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() != args.world_size:
            raise UserError(
                f"the process group has {dist.get_world_size()} processes, TrainingArguments {args.world_size}: each "
                f"would train alone. On machines without a GPU pass use_cpu=True."
            )
        if self._saves_checkpoints:
            refuse_base_in_files(args, model)
            save_adapter_alone(unwrapped(model), self._ready)  # a callback that was added later saw no on_init_end
            if state.is_world_process_zero:
                name_unwritten()
        output_dir = Path(args.output_dir or ".")
        together(lambda: self._hold(output_dir) if state.is_world_process_zero else None)
        allocator = self.allocator
        if allocator is None or not self._attached_early:
            if state.global_step > 0:
                raise Unsupported(
                    f"training goes on at step {state.global_step}, but AdaLoraCallback alone cannot restore masks and "
                    f"importance; resume with AdaLoraTrainer or AdaLoraSFTTrainer."
                )
            allocator = self.attach(model, kwargs["optimizer"], state.max_steps)
        self._attached_early = False
        # A compiled model's graph has no place for hooks.
        self._first_step = None if args.torch_compile else FirstStep(model)
        together(lambda: self._open(output_dir) if state.is_world_process_zero else None)
        self._soundness = Soundness(
            model,
            allocator,
            max_skipped_steps=self.max_skipped_steps,
            scales_loss=bool(args.fp16),
            output_dir=output_dir,
            settle=self.settle,
        )
        if allocator.last_allocation is not None:
            self._last_written = allocator.last_allocation.step
        self._clock, self._tokens = time.perf_counter(), float(state.num_input_tokens_seen)

    def _hold(self, output_dir: Path) -> None:
        if self.lease is None:
            self.lease = self._own_lease = take(output_dir)

    def _open(self, output_dir: Path) -> None:
        kept = self.kept_lines or {}
        self.records = {
            name: JsonLines(output_dir / name, keep=kept.get(name, 0), allowed=self.require_lease)
            for name in (METRICS_NAME, RANKS_NAME, SCORES_NAME)
        }

    def require_lease(self) -> None:
        """See on rank 0 that output_dir is still this run's, before something is written there.

        Raises:
            UserError: another run has taken it.
        """
        if self.lease is not None:
            self.lease.require()

    def attach(self, model: nn.Module, optimizer: object, total_step: int) -> RankAllocator:
        """Build the allocator and hook it into the optimizer; trainers that resume do so before training begins."""
        injection = injection_of(model)
        if injection is None:
            raise UserError("the model has no AdaLoRA layers; call inject_adalora(model, config) first.")
        self.allocator = RankAllocator(model, injection.config, total_step=total_step).attach(optimizer)
        self._attached_early = True
        self._guarded_step = -1
        if rank_and_size()[0] == 0:
            _name_left_out(injection.left_out)
        return self.allocator

    @property
    def skipped_in_a_row(self) -> int:
        """How many of the last steps had no finite gradient."""
        return self._soundness.in_a_row if self._soundness is not None else 0

    def guard(self) -> None:
        """See that weights are numbers, and compare ranks, once a step at most and never with guard_every=0.

        All ranks call it before they save.

        Raises:
            WrongEnd: something trained is not finite.
            RanksDisagree: ranks differ: what would be written is not what every rank trains.
        """
        if self._soundness is not None:
            self._soundness.require_numbers()
        self._compare_ranks()

    def _compare_ranks(self) -> None:
        allocator = self.allocator
        if allocator is None or allocator.config.guard_every == 0 or allocator.step == self._guarded_step:
            return
        allocator.check_consistency()
        self._guarded_step = allocator.step

    def forget_guard(self) -> None:
        """Let the next guard look again although no step passed: weights were loaded."""
        self._guarded_step = -1

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count a step that a GradScaler dropped, and write the step's allocation if there was one."""
        if self.allocator is None:
            return
        if self._first_step is not None:
            self._first_step.name_idle()
            self._first_step = None
        self.allocator.skip_missed_steps(state.global_step)
        every = self.allocator.config.guard_every
        if every and state.global_step % every == 0:
            self._compare_ranks()
        if self._soundness is not None:
            self._soundness.after_step()
        self._before_save(control, kwargs["model"])
        allocation = self.allocator.last_allocation
        if allocation is not None and allocation.step != self._last_written:
            self._last_written = allocation.step
            if RANKS_NAME in self.records:
                spent = {"budget": allocation.budget, "spent": self.allocator.spent}
                self.records[RANKS_NAME].write({"step": allocation.step, **spent, "ranks": allocation.ranks})
                write_scores(self.records[SCORES_NAME], self.allocator)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write one object to metrics.jsonl: the trainer's figures with the allocator's beside them."""
        if METRICS_NAME not in self.records or self.allocator is None or not logs:
            return
        figures = dict(logs)
        self._clock += logs.get("eval_runtime", 0.0)  # tokens_per_second is training's
        if "loss" in logs:
            speed = self._speed(logs, state)
            self.tokens_per_second = speed.get("tokens_per_second")
            figures.update(speed)
            figures.update(self.allocator.metrics())
        self.records[METRICS_NAME].write({"step": state.global_step, **figures})

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that what the trainer is going to write is sound."""
        self._before_save(control, kwargs["model"])

    def _before_save(self, control: TrainerControl, model: nn.Module) -> None:
        """Look before the trainer writes its own checkpoint, and deletes an older one for it."""
        if control.should_save and self._saves_checkpoints and self.allocator is not None:
            self.guard()
            self._gather(model)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Be ready for the checkpoint that a trainer writes of its best evaluation."""
        if args.save_strategy == "best" and self._saves_checkpoints and self.allocator is not None:
            self._gather(kwargs["model"])

    def _gather(self, model: nn.Module) -> None:
        """Put the adapter together on all ranks, once a step, where the one that writes could not read it alone."""
        if self.allocator is not None and not is_readable(model) and not self._is_gathered():
            self._whole = self.allocator.step, gather_adapter(model)

    def _is_gathered(self) -> bool:
        """Whether that was done at this very step; the same on all ranks."""
        return self._whole is not None and self.allocator is not None and self._whole[0] == self.allocator.step

    def _ready(self) -> WholeAdapter | None:
        return self._whole[1] if self._whole is not None and self._is_gathered() else None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the adapter beside what the trainer just wrote."""
        if self.allocator is not None and self._saves_checkpoints:
            self.guard()
            together(self.require_lease)
            folder = Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"
            whole = self._ready() if self._is_gathered() else gather_adapter(kwargs["model"])
            write_gathered(whole, folder, named=False)  # what the trainer wrote said so

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the adapter."""
        if self.allocator is not None:
            self.guard()
            if self._soundness is not None:
                self._soundness.at_end()
            together(self.require_lease)
            whole = gather_adapter(kwargs["model"])
            write_gathered(whole, args.output_dir or ".")
            if self.reports and self.records:
                leave_report(Path(args.output_dir or "."))
            if self._saves_checkpoints and not is_readable(kwargs["model"]):
                self._whole = self.allocator.step, whole  # for a save_model after training
        if self._own_lease is not None:
            self._own_lease.release()
            self.lease = self._own_lease = None

    def _speed(self, logs: dict[str, Any], state: TrainerState) -> dict[str, float]:
        """Tokens a second over all ranks since the last log; SFTTrainer and Trainer count them in different places."""
        tokens = float(logs.get("num_tokens", state.num_input_tokens_seen) or 0)
        now = time.perf_counter()
        elapsed, seen = now - self._clock, tokens - self._tokens
        self._clock, self._tokens = now, tokens
        return {"tokens_per_second": seen / elapsed} if seen > 0 and elapsed > 0 else {}


def _name_left_out(reasons: dict[str, str]) -> None:
    """Name once the linear layers that `all-linear` left out."""
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name, why in reasons.items() if why == reason]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        say(f"adalora.target_modules=all-linear leaves out '{names[0]}'{more}: {reason}", to=sys.stderr)
