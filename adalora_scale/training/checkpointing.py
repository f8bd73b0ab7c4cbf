"""A trainer's checkpoints: which one to go on from, putting it back, writing the next, stopping on a signal."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback

from adalora_scale.adalora.compaction import compact
from adalora_scale.adalora.injection import adapter_layers, file_forms, injected_module, injection_of
from adalora_scale.adalora.scores import score_named
from adalora_scale.checkpoint.background import BackgroundWriter
from adalora_scale.checkpoint.draft import Draft
from adalora_scale.checkpoint.finding import find_checkpoint, set_aside
from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.checkpoint.identity import plain, require_same_run
from adalora_scale.checkpoint.rng import rng_state, set_rng_state
from adalora_scale.checkpoint.state import allocator_position, gather, masks_of, read_weights, scatter, score_of
from adalora_scale.checkpoint.writing import agree, probe_shared, rank_and_size, rotate, write_checkpoint
from adalora_scale.controller import RankAllocator
from adalora_scale.data.digests import data_fingerprint
from adalora_scale.engines import base_optimizer
from adalora_scale.engines.ranks import everywhere, together
from adalora_scale.errors import INTERRUPTED_EXIT_CODE, Interrupted, UserError
from adalora_scale.export.tied import tied_names
from adalora_scale.files import write_json
from adalora_scale.messages import say
from adalora_scale.training.base_weights import KEY as BASE_FILES
from adalora_scale.training.base_weights import BaseWeights
from adalora_scale.training.history import best_so_far, bring_lines
from adalora_scale.training.loop_state import loop_state, restore_optimizer, restore_sums
from adalora_scale.training.records import WRONG_END_NAME, versions
from adalora_scale.training.signals import FAILED, StopRequest
from adalora_scale.training.stopping import REQUEUE_NAME, exit_code, stopping
from adalora_scale.training.uploading import Uploader

TRAINER_STATE_NAME = "trainer_state.json"

# Fields of TrainingArguments that decide what is trained. Batch sizes count together, as the global batch.
_ARGUMENTS = (
    "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "optim_args",
    "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "seed", "data_seed", "label_smoothing_factor",
    "neftune_noise_alpha", "dataloader_drop_last", "train_sampling_strategy", "average_tokens_across_devices",
)  # fmt: skip


def compact_for(checkpoint: Checkpoint, model: nn.Module, *, asked: bool | None, exact: bool) -> bool:
    """Build the adapters of a freshly injected model at the checkpoint's pruned ranks, where that is wanted.

    Args:
        checkpoint: what the run goes on from.
        model: the model with adapters at init_r, not yet wrapped or sharded.
        asked: `training.resume_compact`; None leaves it to `exact`.
        exact: whether the run could continue bit for bit (same ranks, engine and micro-batch); fewer columns are the
            same sums in another order of rounding.

    Returns:
        Whether the model was compacted.
    """
    position = checkpoint.manifest["allocator"]
    masks = masks_of(position)
    triplets = {name: layer.matrices * layer.r for name, layer in adapter_layers(model)}
    # Otherwise `load` refuses the checkpoint, and says which key differs.
    fits = triplets == {name: len(mask) for name, mask in masks.items()}
    # Columns that the score keeps cannot be left out.
    possible = position["frozen"] and not score_named(score_of(position)).keeps_columns and fits
    if asked is True and not position["frozen"]:
        raise UserError(
            f"training.resume_compact=true, but {checkpoint.directory} is from before the final allocation: ranks may "
            f"still return. Remove the key."
        )
    wanted = asked if asked is not None else checkpoint.manifest["compact"] or not exact
    if possible and wanted:
        compact(model, masks)
    return possible and wanted


class RunCheckpoints:
    """Checkpoints of one trainer.

    Args:
        trainer: an AdaLoRA trainer.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        trainer.adalora_callback.settle = self.settle
        self.stop = StopRequest()
        self.resumed: Checkpoint | None = None
        """What this run goes on from."""
        self.run_identity: dict[str, Any] = {}
        """Further keys of the run's config that must not change (`make_trainer` sets them)."""
        self.base_weights: BaseWeights | None = None
        """The files of the base, where `make_trainer` knows them."""
        self.allowed_changes: list[str] = []
        """`training.resume_allow_changed`."""
        self.uploader: Uploader | None = None
        """On rank 0, where there is a `training.output_store`."""
        self.async_save = False
        """`training.async_save`: whether checkpoints are written while training goes on."""
        self._background: BackgroundWriter | None = None
        self._saved_step = -1
        self._fingerprint: str | None = None

    @property
    def output_dir(self) -> Path:
        """The run's folder."""
        return Path(self.trainer.args.output_dir or ".")

    @property
    def kept_lines(self) -> dict[str, int] | None:
        """Of a continued run: file → how many of its lines stay."""
        return self.resumed.manifest["records"] if self.resumed is not None else None

    # ---- going on -----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Clear the way for this run's own checkpoints, and agree on the run's name; rank 0 writes."""

        def clear() -> str:
            for name in (REQUEUE_NAME, WRONG_END_NAME):
                (self.output_dir / name).unlink(missing_ok=True)
            aside = set_aside(self.output_dir, self.resumed)
            if aside:
                say(f"not continued, renamed to abandoned-…: {', '.join(aside)}")
            if self.resumed is not None:
                source, kept = self.resumed.directory.absolute().parent, self.resumed.manifest["records"]
                for sentence in bring_lines(source, self.output_dir, kept, self.resumed.manifest["step"]):
                    say(f"note: {sentence}; the history begins later")
            return uuid.uuid4().hex  # draws from no generator that training uses

        probe_shared(self.output_dir)  # a trainer made by hand has not chosen a checkpoint, which looks too
        self.stop.run = agree(clear if rank_and_size()[0] == 0 else None, self.output_dir)[0]
        self._background = BackgroundWriter(self.stop.run)

    def load(self, allocator: RankAllocator) -> None:
        """Put the chosen checkpoint into the wrapped model, its optimizer and the attached allocator.

        Raises:
            UserError: it is of another run.
            CheckpointError: its files do not hold what this model trains.
        """
        checkpoint = self.resumed
        if checkpoint is None:
            return
        trainer = self.trainer
        own, modules = self._identity(allocator), set(checkpoint.manifest["allocator"]["mask"])
        allowed = [key for key in self.allowed_changes if key != BASE_FILES]
        changed = agree(
            lambda: require_same_run(checkpoint, own, allowed, same_modules=modules == set(allocator.modules)),
            checkpoint.directory,
        )[0]
        if self.base_weights is not None and (saved := checkpoint.manifest.get(BASE_FILES)):
            self.base_weights.require_same(saved, allowed=BASE_FILES in self.allowed_changes)
        scatter(checkpoint, trainer.model, allocator.sharding, allocator)
        restore_optimizer(trainer, base_optimizer(trainer.optimizer), checkpoint.manifest["loop"], changed)
        if rank_and_size()[0] == 0:
            position = checkpoint.manifest["allocator"]
            built = "; adapters built at their pruned ranks" if allocator.compact else ""
            note = f", although these changed: {', '.join(changed)}" if changed else ""
            say(
                f"resumed from {checkpoint.directory} (step {position['step']} of {position['total_step']}, written by "
                f"{checkpoint.manifest['engine']} on {checkpoint.world_size} ranks){built}{note}"
            )

    def begin_upload(self) -> None:
        """Clear the way on the store, once this run is known to go on from what is there; a collective call."""
        step = None if self.resumed is None else int(self.resumed.manifest["step"])

        def begin() -> None:
            if self.uploader is not None:
                self.uploader.begin(self.stop.run, step)

        together(begin)

    def load_weights(self, directory: str, allocator: RankAllocator) -> None:
        """Put the weights of another checkpoint of this run into the live parameters.

        Raises:
            CheckpointError: it is damaged.
        """
        checkpoint = find_checkpoint(directory, self.output_dir)
        if checkpoint is not None:
            read_weights(checkpoint, self.trainer.model, allocator.sharding)

    def load_sums(self) -> None:
        """Restore what the loop has just set to zero."""
        if (checkpoint := self.resumed) is None:
            return
        together(lambda: restore_sums(self.trainer, checkpoint, *rank_and_size()))
        self._find_best(checkpoint)

    def _find_best(self, checkpoint: Checkpoint) -> None:
        """Say where the best checkpoint is now; transformers forgets it where it is not at its old path."""
        state, places = self.trainer.state, [checkpoint.directory.absolute().parent, self.output_dir]

        def look() -> tuple[str | None, str | None]:
            said = json.loads((checkpoint.directory / TRAINER_STATE_NAME).read_text("utf-8"))["best_model_checkpoint"]
            return said, best_so_far(said, places)

        said, state.best_model_checkpoint = everywhere(look if rank_and_size()[0] == 0 else lambda: None)[0]
        if said is not None and state.best_model_checkpoint is None:
            state.best_metric = state.best_global_step = None
            if rank_and_size()[0] == 0:
                say(f"note: the best checkpoint so far, {said}, is gone: the best to come is taken")

    def load_rng(self) -> None:
        """Restore this rank's random numbers; ranks that the checkpoint does not know keep their own."""
        checkpoint, rank = self.resumed, rank_and_size()[0]
        if checkpoint is None:
            return
        keys = [f"rng.{name}" for name in ("python", "python_rest", "numpy", "numpy_rest", "torch", "cuda")]

        def read() -> dict[str, Tensor | None]:
            return {key: checkpoint.extra(rank, key) for key in keys} if rank < checkpoint.world_size else {}

        found = {key: value for key, value in together(read).items() if value is not None}
        if found:
            set_rng_state(found)

    # ---- writing ------------------------------------------------------------------------------------------------

    def save(self, allocator: RankAllocator) -> None:
        """Write `checkpoint-<step>`, once a step, and delete what `save_total_limit` allows; all ranks call it.

        With `async_save` it is only begun, once the one before is complete; `settle` waits for it.

        Raises:
            RanksDisagree: ranks hold different values; nothing is written.
            CheckpointError: the disk is full or the folder cannot be written; earlier checkpoints are untouched.
        """
        trainer, step = self.trainer, self.trainer.state.global_step
        if step == self._saved_step:
            return
        self.settle()
        trainer.adalora_callback.guard()
        together(trainer.adalora_callback.require_lease)
        base = base_optimizer(trainer.optimizer)
        loop, tensors = loop_state(trainer, base)
        records = trainer.adalora_callback.records
        content = {
            "engine": trainer.engine,
            "micro_batch": [trainer.args.per_device_train_batch_size, trainer.args.gradient_accumulation_steps],
            "allocator": allocator_position(allocator),
            "identity": plain(self._identity(allocator)),
            "optimizer": {"class": type(base).__name__},
            "compact": allocator.compact,
            "forms": file_forms(trainer.model),
            "ties": tied_names(trainer.model),
            "loop": loop,
            "records": {name: lines.lines for name, lines in records.items()},
            "base_model": getattr(injected_module(trainer.model), "name_or_path", None),
            "versions": versions(),
        }
        if self.base_weights is not None:
            content[BASE_FILES] = self.base_weights.digests()
        gathered = gather(trainer.model, allocator.sharding, allocator)
        state = json.dumps(dataclasses.asdict(trainer.state), sort_keys=True) + "\n"
        texts = {TRAINER_STATE_NAME: state}
        extras = tensors | rng_state()
        clean_up = self._clean_up()
        if self.async_save and self._background is not None:
            allowed = trainer.adalora_callback.require_lease
            draft = Draft.of(self.output_dir, step, gathered, content, texts, allowed)
            self._background.start(draft, gathered.groups, extras, clean_up)
        else:
            write_checkpoint(self.output_dir, step, gathered, extras, content, texts)
            if rank_and_size()[0] == 0:
                clean_up()
        self._saved_step = step

    def _clean_up(self) -> Callable[[], None]:
        """Return what rank 0 does once a checkpoint of this moment is complete."""
        trainer = self.trainer
        records = list(trainer.adalora_callback.records.values())
        limit, best = trainer.args.save_total_limit, trainer.state.best_model_checkpoint
        sound = not trainer.adalora_callback.skipped_in_a_row  # else the last sound one may be the next to go

        def clean_up() -> None:
            for lines in records:
                lines.sync()
            if self.uploader is None:
                rotate(self.output_dir, limit if sound else None, best)
                return
            with self.uploader.rotating() as busy:
                rotate(self.output_dir, limit if sound else None, best, busy)
            self.uploader.wake(limit, best, rotates=sound)

        return clean_up

    def settle(self) -> None:
        """Wait until a checkpoint that is being written is complete; a collective call.

        Raises:
            CheckpointError: it could not be written; earlier checkpoints are untouched.
        """
        if self._background is not None:
            self._background.settle()

    @contextlib.contextmanager
    def complete(self) -> Iterator[None]:
        """Leave no checkpoint half written behind training, however it ends."""
        ended = False
        try:
            yield
            self.settle()
            ended = True
        finally:
            if self._background is not None:
                self._background.close()
            if self.uploader is not None and not ended:
                self.uploader.close()

    def finish_upload(self) -> None:
        """Wait for the store, and give it what the run leaves; a collective call.

        Raises:
            UserError: something is not on the store; all of it is in output_dir.
        """

        def finish() -> None:
            uploader, self.uploader = self.uploader, None
            if uploader is not None:
                uploader.finish(self.trainer.processing_class)
                self._clean_up()()  # what stayed on disk because it was being uploaded

        together(finish)

    def stop_if_asked(self, allocator: RankAllocator) -> None:
        """After a completed step: when a signal asked for it, leave a checkpoint and end training on all ranks.

        Raises:
            Interrupted: a signal asked to stop.
            CheckpointError: the checkpoint that was being written meanwhile could not be.
            UserError: the note that says so does not fit on the disk; the checkpoint is there.
        """
        step = self.trainer.state.global_step
        failed = self._background is not None and self._background.failed
        if (said := self.stop.agreed(step, FAILED if failed else None)) is None:
            return
        self.settle()
        self.trainer.write_checkpoint(allocator)
        self.settle()
        code = exit_code(said)

        def leave_note() -> None:
            if rank_and_size()[0] == 0 and code == INTERRUPTED_EXIT_CODE:
                self.trainer.adalora_callback.require_lease()
                write_json(self.output_dir / REQUEUE_NAME, {"step": step, "signal": said})
            if self.uploader is not None:
                self.uploader.settle_or_note()

        together(leave_note)
        if rank_and_size()[0] == 0:
            say(f"{said}: checkpoint-{step} is written; resume_from_checkpoint=auto goes on from it")
        raise Interrupted(f"stopped by {said} after step {step}", code)

    # ---- what must stay the same --------------------------------------------------------------------------------

    def _identity(self, allocator: RankAllocator) -> dict[str, Any]:
        trainer = self.trainer
        args = trainer.args
        if self._fingerprint is None:
            self._fingerprint = data_fingerprint(trainer.train_dataset) if rank_and_size()[0] == 0 else ""
        batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        injection = injection_of(trainer.model)
        own = {
            **{f"adalora.{key}": value for key, value in dataclasses.asdict(allocator.config).items()},
            **{f"training.{key}": getattr(args, key) for key in _ARGUMENTS if hasattr(args, key)},
            **self.run_identity,
            "total_step": allocator.schedule.total_step,
            "global_batch": batch,
            "base_fingerprint": injection.base_fingerprint if injection else None,
        }
        own.pop("adalora.guard_every")
        if self._fingerprint:
            own["data_fingerprint"] = self._fingerprint
        return own


class AfterReset(TrainerCallback):
    """Training begins once the loop has set its sums to zero; a continued run then puts them back.

    From here on a signal stops training after a step, with a checkpoint.
    """

    def __init__(self, checkpoints: RunCheckpoints) -> None:
        self._checkpoints = checkpoints

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._checkpoints.load_sums()
        stopping.defer()
