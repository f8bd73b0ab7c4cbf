"""What a run's arguments make of transformers' loop, tried out before the model is loaded.

transformers checks most values where it uses them: an optimizer's after the model is there, a scheduler's in `train`.
Here each is used once on one small parameter, so that what would have been a traceback is one line. What transformers
takes and never looks at is checked by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import SchedulerType, Trainer, TrainingArguments
from transformers.optimization import get_scheduler
from transformers.utils import logging as hf_logging

from adalora_scale.engines.ranks import together
from adalora_scale.errors import UserError, nearest
from adalora_scale.messages import cause, say
from adalora_scale.training.optimizers import writes_checkpoints

_AT_LEAST = {
    "dataloader_num_workers": 0,
    "eval_accumulation_steps": 1,
    "eval_delay": 0,
    "pad_to_multiple_of": 1,
    "torch_empty_cache_steps": 1,
    "logging_steps": 0,
    "eval_steps": 0,
    "save_steps": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "ddp_bucket_cap_mb": 1,
    "ddp_timeout": 1,
    "seed": 0,
    "data_seed": 0,
}
_WORDS: dict[str, Callable[[], list[str]]] = {
    "include_num_input_tokens_seen": lambda: ["no", "all", "non_padding"],
    "log_level": lambda: ["passive", *hf_logging.get_log_levels_dict()],
    "log_level_replica": lambda: ["passive", *hf_logging.get_log_levels_dict()],
    "loss_type": lambda: ["nll", "dft"],
    "torch_compile_backend": torch._dynamo.list_backends,
    "torch_compile_mode": lambda: ["default", *torch._inductor.list_mode_options()],
    "train_sampling_strategy": lambda: ["random", "sequential", "group_by_length"],
}
"""Keys that take a word from a list, and are typed as any text."""
_CHECKPOINTING = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")
_OWN_METRICS = ("batch_eval_metrics", "include_for_metrics")
_WITHOUT_EFFECT = {
    "do_train": "a run always trains",
    "do_eval": "data.eval or data.eval_fraction asks for evaluation",
    "do_predict": "a run predicts nothing; see adalora-scale evaluate",
    "packing_strategy": "data.packing keeps examples whole",
    "shuffle_dataset": "the order of rows is training.train_sampling_strategy's",
    "length_column_name": "rows have their length where it is needed",
    "local_rank": "the launcher says which rank a process is",
}
"""Keys that are transformers' or TRL's and decide nothing here."""


def check_values(training: dict[str, Any]) -> None:
    """Refuse values that transformers takes and fails at, or never looks at; name keys without effect.

    Args:
        training: the section, converted.

    Raises:
        UserError: naming the key and what it takes.
    """
    for key, least in _AT_LEAST.items():
        value = training.get(key)
        if isinstance(value, int | float) and not isinstance(value, bool) and value < least:
            raise UserError(f"training.{key} is {value}; it must be at least {least}.")
    for key in ("seed", "data_seed"):
        if (value := training.get(key)) is not None and value >= 2**32:
            raise UserError(f"training.{key} is {value}; it must be below 2**32.")
    for key, words in _WORDS.items():
        value = training.get(key)
        if isinstance(value, str) and value not in (known := words()):
            raise UserError(f"training.{key}={value} is unknown.{nearest(value, known)} Known: {', '.join(known)}.")
    if not 0 <= training.get("label_smoothing_factor", 0) < 1:
        raise UserError(
            f"training.label_smoothing_factor is {training['label_smoothing_factor']}; it must be in [0, 1)."
        )
    options = training.get("gradient_checkpointing_kwargs")
    if options is not None and not isinstance(options, dict):
        raise UserError("training.gradient_checkpointing_kwargs must be a mapping, such as {use_reentrant: false}.")
    for name in options or {}:
        if name not in _CHECKPOINTING:
            hint = nearest(name, _CHECKPOINTING)
            raise UserError(f"unknown key 'training.gradient_checkpointing_kwargs.{name}'.{hint}")
    if training.get("activation_offloading") and not torch.cuda.is_available():
        raise UserError(
            "training.activation_offloading=true needs a GPU to move activations off, and there is none; remove it."
        )
    if training.get("dataloader_persistent_workers") and not training.get("dataloader_num_workers"):
        raise UserError(
            "training.dataloader_persistent_workers=true needs training.dataloader_num_workers of at least 1."
        )
    if training.get("label_names", ["labels"]) not in (["labels"], None):
        raise UserError(
            f"training.label_names is {training['label_names']}; rows have their labels in 'labels' alone. Remove it; "
            "the column that they come from is data.label_column."
        )
    for key in _OWN_METRICS:
        if training.get(key):
            raise UserError(f"training.{key} is for a compute_metrics function of one's own; remove it.")
    if training.get("save_strategy") == "best" and not training.get("metric_for_best_model"):
        raise UserError("training.save_strategy=best needs training.metric_for_best_model, such as eval_loss.")


def name_unused(training: dict[str, Any], arguments: TrainingArguments) -> None:
    """Say which keys of the section have no effect on a run with these arguments, one line each."""
    for key, reason in _WITHOUT_EFFECT.items():
        if key in training:
            say(f"note: training.{key} has no effect here: {reason}")
    if "num_train_epochs" in training and arguments.max_steps > 0:
        say(f"note: training.num_train_epochs has no effect beside training.max_steps={arguments.max_steps}")
    chooses = arguments.load_best_model_at_end or arguments.save_strategy == "best"
    follows = arguments.lr_scheduler_type == "reduce_lr_on_plateau"
    for key, needed, there in (
        ("hub_model_id", "training.push_to_hub=true", training.get("push_to_hub")),
        ("greater_is_better", "training.metric_for_best_model", arguments.metric_for_best_model),
        (
            "metric_for_best_model",
            "training.load_best_model_at_end=true or training.save_strategy=best",
            chooses or follows,
        ),
    ):
        if training.get(key) is not None and not there:
            say(f"note: training.{key} has no effect without {needed}")
    if training.get("async_save") and not writes_checkpoints(arguments.save_strategy, arguments.save_only_model):
        say("note: training.async_save has no effect with training.save_strategy=no: a signal waits for its checkpoint")
    if training.get("output_store") and arguments.save_only_model:
        say("note: training.output_store gets the results alone: training.save_only_model=true leaves no checkpoints")
    if training.get("fp16") and arguments.device.type == "cpu" and not arguments.deepspeed:
        say("note: training.fp16 has no effect on a CPU, which computes in the weights' dtype: see model.torch_dtype")


def check_tokens(training: dict[str, Any], tokenizer: Any) -> None:
    """See that tokens that the section names are tokens of the tokenizer.

    Raises:
        UserError: one is not.
    """
    vocabulary = tokenizer.get_vocab() if {"eos_token", "pad_token"} & training.keys() else {}
    for key in ("eos_token", "pad_token"):
        if (token := training.get(key)) is not None and token not in vocabulary:
            raise UserError(f"training.{key}={token} is no token of the tokenizer; name one of its tokens.")


def check_loop(arguments: TrainingArguments, steps: int) -> None:
    """Make the optimizer and the schedule of a run of `steps` steps once, for one small parameter.

    Raises:
        UserError: naming the keys that one of them is made of.
    """
    parameter = nn.Parameter(torch.zeros(1, 1))
    with _said("training.optim, optim_args, learning_rate, adam_beta1, adam_beta2, adam_epsilon"):
        if any(word in str(arguments.optim) for word in ("galore", "apollo", "lomo")):
            return  # they take the model
        factory, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        optimizer = factory([parameter], **options)
    schedule = SchedulerType(arguments.lr_scheduler_type).value
    with _said(f"training.lr_scheduler_type={schedule} and training.lr_scheduler_kwargs"):
        get_scheduler(
            arguments.lr_scheduler_type,
            optimizer=optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,  # type: ignore[arg-type]  # parsed by then
        )


def check_hub(arguments: TrainingArguments) -> None:
    """See that the hub can be asked and knows its user, where the run is to be pushed to it; a collective call.

    Raises:
        UserError: it cannot or does not.
    """
    if not arguments.push_to_hub:
        return
    from huggingface_hub import HfApi

    def ask() -> None:
        if arguments.process_index != 0:
            return
        try:
            HfApi(token=arguments.hub_token).whoami()
        except Exception as error:
            raise UserError(
                f"training.push_to_hub=true: the hub does not take this run ({cause(error, 160)}). "
                "Log in with hf auth login, or remove the key and push the adapter's folder later."
            ) from None

    together(ask)


@contextmanager
def _said(keys: str) -> Iterator[None]:
    """Turn what another library says of values into one line that names their keys."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{keys}: {cause(error, 300)}") from None
