"""transformers' Trainer and TRL's SFTTrainer with AdaLoRA: the loops are theirs, the mixin adds the method.

The seams overridden here were checked against transformers 5.23 and TRL 1.16; pyproject pins the ranges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, Trainer
from trl import SFTTrainer

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.peft_adalora import save_adapter, saved_values, unwrapped
from adalora_scale.sharding import sharding_for
from adalora_scale.training.arguments import refuse_resume, require_evaluation_at_budget
from adalora_scale.training.callback import AdaLoraCallback
from adalora_scale.training.engines import check_engine, is_sharded, real_engine, refuse_mismatches
from adalora_scale.training.packing import check_packing_isolated

# The mixin stands in front of a Trainer; telling the type checker so keeps the seams below checked.
if TYPE_CHECKING:
    _TrainerSeams = Trainer
else:
    _TrainerSeams = object


class AdaLoraTrainerMixin(_TrainerSeams):
    """Adds to a Trainer: injection, the allocator, adapter-sized saving, and AdaLoRA's figures in every log.

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
        if "SequenceClassification" in type(model).__name__:
            # transformers 5.23: these take num_items_in_batch and ignore it, so that Trainer's correction for it
            # multiplies loss and gradient by the number of ranks and of micro-batches.
            model.accepts_loss_kwargs = False  # type: ignore[assignment]
        self.asked_engine: str | None = None
        """ddp, fsdp2 or deepspeed: what must hold the model when training starts; None asks for nothing by name."""
        self.engine = "not started"
        super().__init__(model, *args, **kwargs)
        # The model owns its placement and the reduction of its gradients; accelerate must not wrap it again.
        self.is_distributed_loading_by_transformers |= is_sharded(model)
        self.adalora_callback = AdaLoraCallback(saves_checkpoints=False)
        self.add_callback(self.adalora_callback)

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
        enable = getattr(self.model, "enable_input_require_grads", None)
        if args.gradient_checkpointing and callable(enable):
            # Reentrant checkpointing drops gradients of blocks whose input needs none; frozen embeddings give such.
            enable()
        super().create_accelerator_and_postprocess()
        if (plugin := getattr(self.accelerator.state, "deepspeed_plugin", None)) is not None:
            refuse_mismatches(plugin.hf_ds_config)

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        """Leave a sharded model where it is: with CPU offload it must not move."""
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def _prepare_for_training(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Wrap the model, then see that what wraps it is what was asked for."""
        config = getattr(unwrapped(self.model), "adalora_config", None)  # type: ignore[arg-type]
        if config is not None:
            require_evaluation_at_budget(self.args, config, max_steps)
        prepared = super()._prepare_for_training(max_steps, *args, **kwargs)
        self.engine = check_engine(self.model_wrapped, self.asked_engine, world_size=self.args.world_size)
        return prepared

    @contextlib.contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Accumulate gradients without reducing them; under HSDP they stay sharded and only replicas wait."""
        model: Any = self.model
        defer = model.set_requires_all_reduce if real_engine(model) == "hsdp" else model.set_requires_gradient_sync
        defer(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see transformers' Trainer.train.

        Raises:
            Unsupported: resuming was asked for.
        """
        refuse_resume(resume_from_checkpoint or self.args.resume_from_checkpoint)
        return super().train(None, *args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Put AdaLoRA's figures beside the loss, for every tracker the trainer reports to."""
        if self.allocator is not None and "loss" in logs:
            logs.update({k: v for k, v in self.allocator.metrics().items() if not isinstance(v, str)})
        super().log(logs, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter (PEFT format) and the tokenizer, never the frozen base; every rank calls it."""
        if self.model is None:
            return
        directory = Path(output_dir or self.args.output_dir or ".")
        save_adapter(self.model, directory)
        if self.args.should_save and self.processing_class is not None:
            self.processing_class.save_pretrained(directory)

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compare adapters at their budget only: one from before the final allocation is larger than was asked for."""
        if self.allocator is None or not self.allocator.frozen:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _load_best_model(self) -> None:
        """Write the best checkpoint's adapter into the live parameters, wherever the engine keeps them."""
        if self.model is None or self.state.best_model_checkpoint is None:
            return
        sharding, _ = sharding_for(self.model, self.optimizer)
        sharding.write(saved_values(self.model, self.state.best_model_checkpoint))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write nothing: runs cannot be resumed yet, and stock saving writes the frozen base under DeepSpeed."""

    def _save_scaler(self, output_dir: str) -> None:
        """Write nothing, as above."""

    def _save_rng_state(self, output_dir: str) -> None:
        """Write nothing, as above."""


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
        if isinstance(model, str):
            training = kwargs.get("args") or (args[0] if args else None)
            model = AutoModelForCausalLM.from_pretrained(model, **(getattr(training, "model_init_kwargs", None) or {}))
        super().__init__(model, *args, adalora_config=adalora_config, **kwargs)
        head = unwrapped(model).get_output_embeddings()  # type: ignore[operator]
        for name, layer in adapter_layers(model):
            if layer is head:
                raise Unsupported(
                    f"SFTTrainer bypasses an adapter on the output head '{name}'; add it to adalora.exclude_modules."
                )

    def _prepare_for_training(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        """See also that packed examples stay apart: in the wrapped model, which alone can run under ZeRO-3."""
        prepared = super()._prepare_for_training(max_steps, *args, **kwargs)
        if getattr(self.args, "packing", False):
            check_packing_isolated(self.model_wrapped)
        return prepared
