"""The `training:` section: defaults that fit adapters, checked keys and types, transformers' arguments at the end."""

from __future__ import annotations

import math
import sys
from datetime import timedelta
from typing import Any, NoReturn, get_type_hints

import torch
from transformers import TrainingArguments

from adalora_scale.config import AdaLoraConfig, RunConfig, check_value
from adalora_scale.config.hints import hint
from adalora_scale.config.training_keys import OWN_KEYS, refuse_managed
from adalora_scale.engines.engine import Engine
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.files import require_local
from adalora_scale.messages import cause
from adalora_scale.process_rank import process_count
from adalora_scale.tasks.registry import find_task
from adalora_scale.training.batch import batch_sizes
from adalora_scale.training.output_store import TO_A_STORE, check_keys

_COUNTS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "max_skipped_steps",
    "tiled_mlp",
)

_FINITE = ("learning_rate", "weight_decay", "adam_", "warmup", "num_train_epochs", "label_smoothing")
"""How keys begin that mean nothing at infinity; others do (max_grad_norm: measure, and never clip)."""
DEFAULT_LEARNING_RATE = 2e-4
"""TRL's 2e-5 suits full fine-tuning. The default begins as LoRA does, and this is LoRA's usual rate; the published
method (`preset: paper`) was run at 5e-4 to 2e-3."""


def check_training_section(config: RunConfig, world_size: int | None = None) -> dict[str, Any]:
    """Return the section converted, with what global_batch_size means for every rank in its place.

    Args:
        config: the run's.
        world_size: ranks that global_batch_size is divided over; None: as many as the launcher started.

    Raises:
        UserError: as `convert_training_section`, or a global batch that the ranks do not divide.
        Unsupported: as `convert_training_section`.
    """
    checked = convert_training_section(config)
    sizes = batch_sizes(checked, process_count() if world_size is None else world_size)
    checked.pop("global_batch_size", None)
    return checked | sizes


def convert_training_section(config: RunConfig) -> dict[str, Any]:
    """Return the section with values converted to their declared types.

    Raises:
        UserError: a key is unknown or belongs to another section, or a value has the wrong type.
        Unsupported: a key that adapter training cannot keep its promises under.
    """
    hints = (
        get_type_hints(find_task(config.task).arguments_class())
        | OWN_KEYS
        | {"resume_from_checkpoint": bool | str | None}
    )
    checked: dict[str, Any] = {}
    for key, value in config.training.items():
        refuse_managed(key)
        if key not in hints:
            raise UserError(f"unknown key 'training.{key}'.{hint(key, hints)}")
        if value is False and key.endswith("_strategy"):
            value = "no"  # YAML reads the bare word as false
        checked[key] = check_value(f"training.{key}", value, hints[key])
    if isinstance(checked.get("output_dir"), str):
        require_local("training.output_dir", checked["output_dir"], TO_A_STORE)
    check_keys(checked)
    if checked.get("auto_find_batch_size"):
        refuse_batch_search()
    if checked.get("async_save") and checked.get("save_only_model"):
        raise UserError(
            "training.async_save=true writes checkpoints to resume from while training goes on, and "
            "training.save_only_model=true leaves adapters in their place; remove one of them."
        )
    for key in _COUNTS:
        if checked.get(key, 1) < 1:
            raise UserError(f"training.{key} is {checked[key]}; it must be at least 1.")
    for key, value in checked.items():
        if isinstance(value, float) and (math.isnan(value) or (math.isinf(value) and key.startswith(_FINITE))):
            raise UserError(f"training.{key} is {value}; it must be a finite number.")
    if checked.get("learning_rate", 1.0) <= 0:
        raise UserError(f"training.learning_rate is {checked['learning_rate']:g}; it must be positive.")
    return checked


def refuse_batch_search() -> NoReturn:
    """Refuse transformers' search for a batch that fits.

    After each out-of-memory error transformers builds optimizer and steps anew with a smaller batch, on weights that
    have been trained already: another global batch, another total_step, and a second allocator on the same adapters.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(
        "training.auto_find_batch_size=true starts again with other steps after running out of memory, which the "
        "schedule of pruning cannot follow; remove it and set training.per_device_train_batch_size to what "
        "adalora-scale plan says fits (training.global_batch_size keeps the steps)."
    )


def training_arguments(config: RunConfig, engine: Engine) -> TrainingArguments:
    """Build the task's TrainingArguments from the section over defaults that fit adapter training.

    Under FSDP2 `bf16` stays out of the arguments, where it would mean autocast: the sharded model computes in bfloat16
    by itself (`computes_in_bf16`).

    Raises:
        UserError: as `check_training_section`, transformers refuses a combination, or DeepSpeed's configuration
            disagrees with the section.
        Unsupported: as `check_training_section`.
    """
    checked = check_training_section(config)
    options: dict[str, Any] = {
        "learning_rate": DEFAULT_LEARNING_RATE,
        "report_to": "none",
        # Checkpoints are adapter-sized; a week's run without any is lost with its first broken machine.
        "save_strategy": "steps",
        "save_total_limit": 2,
        "logging_steps": 10,
        # transformers writes down 0.0 for a loss that is not a number.
        "logging_nan_inf_filter": False,
        "disable_tqdm": not sys.stderr.isatty(),
        # accelerate starts a process group on CPU only when told that CPU is meant.
        "use_cpu": not torch.cuda.is_available(),
        "bf16": computes_in_bf16(checked),
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if not checked.keys() & {"gradient_checkpointing", "activation_checkpointing"}:
        options["activation_checkpointing"] = False  # TRL's default trades a third of the speed for memory
    options.update({key: value for key, value in checked.items() if key not in OWN_KEYS})
    engine.settle(options)
    if "eval_steps" in options and "eval_strategy" not in options:
        options["eval_strategy"] = "steps"
    if "save_strategy" not in checked and "save_steps" not in checked and checked.get("load_best_model_at_end"):
        options["save_strategy"] = "best"
    task = find_task(config.task)
    task.settle_arguments(options, config.data)
    launched = process_count()
    # Without a GPU accelerate needs to be told that CPU is meant; asked here, before transformers warns about it.
    alone = launched > 1 and not torch.cuda.is_available() and not options["use_cpu"]
    engine.join(_timeout(options), launched=launched, use_cpu=options["use_cpu"])
    try:
        arguments = None if alone else task.arguments_class()(**options)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UserError(f"training: {cause(error, None)}") from None
    if arguments is None or arguments.world_size != launched:
        seen = 1 if arguments is None else arguments.world_size
        raise UserError(
            f"the launcher started {launched} processes, transformers sees {seen}: each would train "
            f"alone. On machines without a GPU set training.use_cpu=true."
        )
    engine.check(arguments)
    return arguments


def require_evaluation_at_budget(args: TrainingArguments, adalora: AdaLoraConfig, steps: int) -> None:
    """Refuse to look for the best checkpoint where no adapter is evaluated at its budget.

    Raises:
        UserError: load_best_model_at_end, and no evaluation from the final allocation on.
    """
    if not args.load_best_model_at_end or args.eval_strategy == "epoch":
        return
    every = 0
    if args.eval_strategy == "steps" and args.eval_steps:
        every = math.ceil(steps * args.eval_steps) if args.eval_steps < 1 else int(args.eval_steps)
    final = steps - adalora.phase_steps(steps)[1]
    if every == 0 or steps // every * every < final:
        raise UserError(
            f"training.load_best_model_at_end compares evaluations from the final allocation (step {final} of {steps}) "
            f"on, and there is none; set training.eval_steps to a divisor of {steps}."
        )


def computes_in_bf16(training: dict[str, Any]) -> bool:
    """Return whether a (checked) section asks for bfloat16, or says nothing where bfloat16 is there."""
    if "bf16" in training:
        return bool(training["bf16"])
    return not training.get("fp16") and torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def _timeout(options: dict[str, Any]) -> timedelta:
    return timedelta(seconds=options.get("ddp_timeout", TrainingArguments.ddp_timeout))


def global_batch(args: TrainingArguments) -> int:
    """Return the examples of an optimizer step over all ranks."""
    world_size = process_count()
    return args.per_device_train_batch_size * args.gradient_accumulation_steps * world_size


def total_steps(args: TrainingArguments, examples: int) -> int:
    """Return the optimizer steps of a run over `examples` training rows, as Trainer counts them."""
    if args.max_steps > 0:
        return args.max_steps
    world_size = process_count()
    batches = math.ceil(examples / (args.per_device_train_batch_size * world_size))
    if args.dataloader_drop_last:
        batches = examples // (args.per_device_train_batch_size * world_size)
    per_epoch = max(math.ceil(batches / args.gradient_accumulation_steps), 1)
    return math.ceil(args.num_train_epochs * per_epoch)
