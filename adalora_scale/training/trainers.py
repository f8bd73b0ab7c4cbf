"""transformers' Trainer and TRL's SFTTrainer with AdaLoRA: the loops are theirs, the mixin adds the method.

The seams overridden here were checked against transformers 5.23 and TRL 1.16; pyproject pins the ranges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, Trainer
from transformers.trainer_callback import ExportableState
from trl import SFTTrainer

from adalora_scale.adalora.injection import adapter_layers, inject_adalora, injection_of
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.data.mixing import Mixture
from adalora_scale.data.packing import check_packing_isolated
from adalora_scale.engines import base_optimizer
from adalora_scale.engines.engine import Engine
from adalora_scale.engines.ranks import together
from adalora_scale.engines.registry import check_engine, is_sharded, real_engine
from adalora_scale.engines.zero_keys import deepspeed_refusals
from adalora_scale.engines.zero_place import refuse_mismatches
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.peft_adalora import save_adapter, saved_values
from adalora_scale.export.whole_adapter import unwrapped
from adalora_scale.files import replacing, writing
from adalora_scale.tasks.registry import task_of_class
from adalora_scale.training.arguments import refuse_batch_search, require_evaluation_at_budget
from adalora_scale.training.callback import AdaLoraCallback
from adalora_scale.training.checkpointing import AfterReset, RunCheckpoints
from adalora_scale.training.choosing import choose_checkpoint
from adalora_scale.training.for_trl import has_own_backward, name_backbone, settle_router_loss
from adalora_scale.training.lease import take
from adalora_scale.training.loop_state import deepspeed_scaler
from adalora_scale.training.objective import settle_objective
from adalora_scale.training.optimizers import writes_checkpoints
from adalora_scale.training.sampling import name_sampler, own_sampler
from adalora_scale.training.stopping import SCHEDULERS, stopping
from adalora_scale.training.token_sums import TokenSums, kept_rows, row_count, without_repeats

# The mixin stands in front of a Trainer; telling the type checker so keeps the seams below checked.
if TYPE_CHECKING:
    _TrainerSeams = Trainer
else:
    _TrainerSeams = object


class AdaLoraTrainerMixin(_TrainerSeams):
    """Adds to a Trainer: injection, the allocator, checkpoints of its own, and AdaLoRA's figures in every log.

    Args:
        model: a base model, or one that `inject_adalora` prepared.
        adalora_config: the method's options; required when the model has no adapters yet.
        kwargs: everything the trainer itself takes.

    Raises:
        UserError: the model has no adapters and no `adalora_config` was given.
    """

    def __init__(
        self, model: nn.Module, *args: Any, adalora_config: AdaLoraConfig | None = None, **kwargs: Any
    ) -> None:
        if not any(True for _ in adapter_layers(model)):
            if adalora_config is None:
                raise UserError(
                    f"{type(self).__name__} needs adapters: pass adalora_config=AdaLoraConfig(...) or call "
                    f"inject_adalora(model, config) first."
                )
            inject_adalora(model, adalora_config)
        elif adalora_config is not None:
            raise UserError("the model already has adapters; leave out adalora_config.")
        training = kwargs.get("args") or (args[0] if args else None)
        if getattr(training, "auto_find_batch_size", False):
            refuse_batch_search()
        task = task_of_class(type(model).__name__)
        if task is not None and task.ignores_num_items:
            # transformers 5.23: its models take num_items_in_batch and ignore it, so that Trainer's correction for it
            # multiplies loss and gradient by the number of ranks and of micro-batches.
            model.accepts_loss_kwargs = False  # type: ignore[assignment]
        self.asked_engine: Engine | None = None
        """What must hold the model when training starts; None asks for nothing by name."""
        self.mixture: Mixture | None = None
        """The order of the training rows where sources are mixed; None leaves it to transformers."""
        self._own_sampler: Any = None
        self.engine = "not started"
        self._saw_state = False
        super().__init__(model, *args, **kwargs)
        # The model owns its placement and the reduction of its gradients; accelerate must not wrap it again.
        self.is_distributed_loading_by_transformers |= is_sharded(model)
        self.adalora_callback = AdaLoraCallback(saves_checkpoints=False)
        self.add_callback(self.adalora_callback)
        self.checkpoints = RunCheckpoints(self)
        self.add_callback(AfterReset(self.checkpoints))

    @property
    def allocator(self) -> RankAllocator | None:
        """The allocator, once training has started."""
        return self.adalora_callback.allocator

    def create_accelerator_and_postprocess(self) -> None:
        """Settle two defaults that only matter with frozen weights, before the accelerator reads them."""
        args = self.args
        if args.ddp_find_unused_parameters is None:
            # Every adapter takes part in every forward; searching for unused ones costs a graph walk a step.
            args.ddp_find_unused_parameters = False
        model = cast(nn.Module, self.model)
        if args.gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", True):
            name = type(model).__name__
            raise UserError(f"training.gradient_checkpointing (activation_checkpointing): {name} has none; remove it.")
        enable = getattr(model, "enable_input_require_grads", None)
        if callable(enable) and (args.gradient_checkpointing or has_own_backward(model)):
            # Reentrant checkpointing drops gradients of blocks whose input needs none; frozen embeddings give such.
            enable()
        super().create_accelerator_and_postprocess()
        if (plugin := getattr(self.accelerator.state, "deepspeed_plugin", None)) is not None:
            refuse_mismatches(plugin.hf_ds_config)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave a sharded model where it is: with CPU offload it must not move."""
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: Any) -> Any:
        """Wrap the model, see that what wraps it is what was asked for, attach the hooks, go on from a checkpoint."""
        injection = injection_of(self.model)  # type: ignore[arg-type]
        if injection is not None:
            require_evaluation_at_budget(self.args, injection.config, max_steps)
        with deepspeed_refusals():
            prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self.engine = check_engine(self.model_wrapped, self.asked_engine, world_size=self.args.world_size)
        allocator = self.adalora_callback.attach(self.model, self.optimizer, max_steps)  # type: ignore[arg-type]
        scaler = deepspeed_scaler(self)
        if scaler is not None and hasattr(scaler, "raise_error_at_min_scale"):
            scaler.raise_error_at_min_scale = False  # max_skipped_steps ends such a run, and names the cause
        self.state.compute_steps(self.args, max_steps)  # trainer_state.json would bring back the old intervals
        self.checkpoints.start()
        self.checkpoints.load(allocator)
        self.checkpoints.begin_upload()
        self.adalora_callback.kept_lines = self.checkpoints.kept_lines
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load nothing yet: weights go into the engine's masters, once they exist."""

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Restore random numbers from the checkpoint's own files."""
        if checkpoint is not None:
            self.checkpoints.load_rng()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Draw a mixture's rows and a stream's places in their order."""
        self._own_sampler = own_sampler(self)
        return self._own_sampler if self._own_sampler is not None else super()._get_train_sampler(train_dataset)

    def get_train_dataloader(self) -> DataLoader:
        """Make the loader, over the order above."""
        loader = super().get_train_dataloader()
        name_sampler(loader, self._own_sampler)
        return loader

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train an epoch, unless the checkpoint was the run's last: transformers would train one step too many."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            if self.model is not None:
                self.model.train()  # SFTTrainer logs training's figures then
            return
        super()._run_epoch(*args, **kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Finish the step as transformers does, then stop if a signal asked for it."""
        self._require_state_that_can_be_written()
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.allocator is not None:
            self.checkpoints.stop_if_asked(self.allocator)

    def _require_state_that_can_be_written(self) -> None:
        """After the first step, when the optimizer has its state: see that checkpoints can hold it.

        Raises:
            Unsupported: they cannot, and this run is going to write some.
        """
        args = self.args
        if self._saw_state or self.allocator is None:
            return
        self._saw_state = bool(base_optimizer(self.optimizer).state)  # none yet where the first step was skipped
        if writes_checkpoints(args.save_strategy, args.save_only_model):
            self.allocator.sharding.pieces()

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Accumulate gradients without reducing them, as the engine can."""
        model: Any = self.model
        with real_engine(model).accumulating(model):
            yield

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers' Trainer.train.

        Args:
            resume_from_checkpoint: a checkpoint's folder; true for the newest of output_dir; "auto" for the newest
                that is not damaged, or a new run where there is none. Default: the training arguments' value.
            args, kwargs: what transformers' Trainer takes.

        Raises:
            UserError: the checkpoint is damaged, or of another run (the message names what changed).
            Interrupted: SIGTERM or SIGUSR1 arrived; a checkpoint was written.
        """
        asked = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        self.checkpoints.stop.begin()
        with self._holding(), self.checkpoints.complete(), stopping.listening(SCHEDULERS):
            if asked is not None and asked is not False and self.checkpoints.resumed is None:
                self.checkpoints.resumed = choose_checkpoint(asked, self.checkpoints.output_dir)
            resumed = self.checkpoints.resumed
            return super().train(str(resumed.directory) if resumed else None, *args, **kwargs)

    @contextlib.contextmanager
    def _holding(self) -> Iterator[None]:
        """Hold output_dir while training lasts, unless who made this trainer does."""
        callback = self.adalora_callback
        if callback.lease is not None or not self.is_world_process_zero():
            together(lambda: None)
            yield
            return
        callback.lease = together(lambda: take(self.checkpoints.output_dir))
        try:
            yield
        finally:
            callback.lease.release()
            callback.lease = None

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        """Leave rows that were repeated to fill the last batch out of its loss, as the loop leaves out their logits."""
        step = super().prediction_step(model, dict(inputs), *args, **kwargs)
        if (kept := kept_rows(self, row_count(inputs))) is None or step[0] is None:
            return step
        return super().prediction_step(model, without_repeats(inputs, kept), True)[0], *step[1:]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put AdaLoRA's figures beside the loss, for every tracker the trainer reports to."""
        if self.allocator is not None and "loss" in logs:
            logs.update({k: v for k, v in self.allocator.metrics().items() if isinstance(v, int | float)})
        if "loss" in logs:
            self._tr_loss.zero_()  # transformers subtracts it from itself: one NaN would be every later loss
        if "train_loss" in logs:
            # transformers divides by the steps since the resume; the sum goes back to the run's first step.
            logs["train_loss"] = self._total_loss_scalar / max(self.state.global_step, 0.001)
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (PEFT format) and the tokenizer, never the frozen base; every rank calls it.

        Raises:
            UserError: on all ranks: the disk is full or the folder cannot be written; earlier files stay.
        """
        if self.model is None:
            return
        directory = Path(output_dir or self.args.output_dir or ".")
        self.adalora_callback.guard()
        together(self.adalora_callback.require_lease)
        save_adapter(self.model, directory)
        tokenizer = self.processing_class

        def write_tokenizer() -> None:
            with replacing(directory) as folder:
                tokenizer.save_pretrained(folder)  # type: ignore[union-attr]

        together(write_tokenizer if self.args.should_save and tokenizer is not None else lambda: None)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare adapters at their budget only: one from before the final allocation is larger than was asked for."""
        self.checkpoints.settle()
        if self.allocator is None or not self.allocator.frozen:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """See that the last checkpoint is there before one is loaded, others are deleted, and the adapter is saved."""
        self.checkpoints.settle()
        return super()._finalize_training(*args, **kwargs)

    def _load_best_model(self) -> None:
        """Write the best checkpoint's weights into the live parameters, wherever the engine keeps them."""
        if self.model is None or self.state.best_model_checkpoint is None or self.allocator is None:
            return
        if self.args.save_only_model:
            model, best = self.model, self.state.best_model_checkpoint
            self.allocator.sharding.write(together(lambda: saved_values(model, best)))
        else:
            self.checkpoints.load_weights(self.state.best_model_checkpoint, self.allocator)
        self.adalora_callback.forget_guard()

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write everything a run needs to go on; with save_only_model just the adapter, as transformers does."""
        if self.args.save_only_model or self.allocator is None:
            with writing(self.checkpoints.output_dir):
                super()._save_checkpoint(model, trial)
        else:
            self.write_checkpoint(self.allocator)

    def write_checkpoint(self, allocator: RankAllocator) -> None:
        """Write everything a run needs to go on, now: after a completed step, on all ranks."""
        self.store_flos()
        if self.state.best_global_step == self.state.global_step:
            folder = self.checkpoints.output_dir / f"checkpoint-{self.state.global_step}"
            self.state.best_model_checkpoint = str(folder)
        states: Any = self.state.stateful_callbacks
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states[type(callback).__name__] = callback.state()
        self.checkpoints.save(allocator)


class AdaLoraTrainer(AdaLoraTrainerMixin, Trainer):
    """transformers' Trainer with AdaLoRA."""


class AdaLoraSFTTrainer(AdaLoraTrainerMixin, SFTTrainer):
    """TRL's SFTTrainer with AdaLoRA; `model` may be a path or hub id, as in TRL.

    With packing, training starts with a check that packed examples do not see each other.

    Raises:
        Unsupported: the output head has an adapter (TRL multiplies by its weight directly and would ignore it).
    """

    def __init__(
        self, model: nn.Module | str, *args: Any, adalora_config: AdaLoraConfig | None = None, **kwargs: Any
    ) -> None:
        training = kwargs.get("args") or (args[0] if args else None)
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **(getattr(training, "model_init_kwargs", None) or {}))
        name_backbone(model)
        settle_router_loss(model, training)
        self._tokens = TokenSums()
        super().__init__(model, *args, adalora_config=adalora_config, **kwargs)
        head = unwrapped(model).get_output_embeddings()  # type: ignore[operator]
        for name, layer in adapter_layers(model):
            if layer is head:
                raise Unsupported(
                    f"SFTTrainer bypasses an adapter on the output head '{name}'; add it to adalora.exclude_modules."
                )

    def _prepare_for_training(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """See also that packed examples stay apart, and that the loss is the model's own: in the wrapped model, which
        alone can run under ZeRO-3."""
        prepared = super()._prepare_for_training(max_steps, *args, **kwargs)
        for key in ("packing", "padding_free"):
            if getattr(self.args, key, False):
                check_packing_isolated(self.model_wrapped, f"{'data' if key == 'packing' else 'training'}.{key}")
                break
        settle_objective(self)
        return prepared

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> Any:
        """Add the batch's token losses to the evaluation's sums."""
        if not prediction_loss_only:  # a caller of SFTTrainer who wants logits
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self._tokens.add(self, model, self._prepare_inputs(inputs))
        return loss, None, None

    def evaluation_loop(self, dataloader: Any, *args: Any, **kwargs: Any) -> Any:
        """Evaluate; the loss is that of all tokens, whatever batches and ranks they were spread over."""
        self._tokens = TokenSums(getattr(dataloader, "dataset", None))
        output = super().evaluation_loop(dataloader, *args, **kwargs)
        return self._tokens.settle(self, output, kwargs.get("metric_key_prefix", "eval"))


def with_adalora(vendor: type[Trainer]) -> type[AdaLoraTrainer] | type[AdaLoraSFTTrainer]:
    """Return the vendor's trainer with AdaLoRA.

    Raises:
        Unsupported: there is none of that vendor's class.
    """
    for ours in (AdaLoraTrainer, AdaLoraSFTTrainer):
        if vendor in ours.__bases__:
            return ours
    raise Unsupported(f"there is no {vendor.__name__} with AdaLoRA; derive one from AdaLoraTrainerMixin.")
