"""One training run, from a config to the files in its output_dir.

Cheap checks come first (keys, files, rows, schedule), the model is loaded when nothing foreseeable is left to fail.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging as hf_logging

from adalora_scale.adalora.injection import coverage, inject_adalora, modules_to_save
from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.config import AdaLoraConfig, RunConfig
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.training import loading
from adalora_scale.training.arguments import (
    check_training_section,
    computes_in_bf16,
    require_evaluation_at_budget,
    total_steps,
    training_arguments,
)
from adalora_scale.training.chat_templates import resolve_chat_template
from adalora_scale.training.checkpointing import check_asked_checkpoint, choose_checkpoint, compact_for
from adalora_scale.training.console import use_console
from adalora_scale.training.data import RawData, load_raw
from adalora_scale.training.engines import (
    Engine,
    partition_zero3,
    resolve_engine,
    shard_fsdp2,
    transformer_blocks,
    whole_weights,
    zero3_options,
)
from adalora_scale.training.metrics import accuracy
from adalora_scale.training.records import hardware, peak_memory_by_rank, versions, write_json
from adalora_scale.training.tokenization import Prepared, prepare_causal_lm, prepare_classification
from adalora_scale.training.trainers import AdaLoraSFTTrainer, AdaLoraTrainer

RUN_NAME = "run.json"
_RUN_FILES = (RUN_NAME, "metrics.jsonl", "ranks.jsonl", "adapter_config.json", "adapter_model.safetensors")


@dataclass
class Inputs:
    """Everything a run needs beside the model."""

    engine: Engine
    arguments: TrainingArguments
    raw: RawData
    tokenizer: PreTrainedTokenizerBase
    data: Prepared
    steps: int


def train(config: RunConfig) -> dict[str, Any]:
    """Train an adapter as `config` says, write the run's files, and return the content of run.json.

    Raises:
        UserError: the config, its files or its data cannot be used.
        Unsupported: the config asks for an engine or quantisation that is not there.
    """
    started = time.time()
    inputs = prepare(config)
    trainer = make_trainer(config, inputs)
    trainer.train()
    final = _final_evaluation(trainer) if inputs.data.eval is not None else {}
    trainer.save_model()
    return _write_run(config, inputs, trainer, final, started)


def prepare(config: RunConfig) -> Inputs:
    """Check everything that can be checked without the model, and tokenise the data.

    No rank waits for another in a collective here, so long tokenisation cannot run into a process group's timeout.
    """
    engine = resolve_engine(config.engine)
    training = check_training_section(config)
    _check_output_dir(training)
    check_asked_checkpoint(training.get("resume_from_checkpoint"), Path(training["output_dir"]))
    check_model_path(config)
    if config.model.load_in_4bit:
        loading.quant_spec(config.model)
    seed = training.get("seed", 42)
    raw = load_raw(config.data, task=config.task, seed=seed)
    arguments = training_arguments(config, engine)
    if raw.eval is None and arguments.eval_strategy != "no":
        raise UserError("training.eval_strategy needs evaluation data; set data.eval or data.eval_fraction.")
    tokenizer = load_tokenizer(config)
    if config.task == "causal_lm":
        template = resolve_chat_template(tokenizer, config.data, layout=raw.layout)
        data = prepare_causal_lm(raw, tokenizer, config.data, seed=seed)
        if template is not None:
            # The saved tokenizer must render conversations the way the adapter learnt them.
            tokenizer.chat_template = template
    else:
        data = prepare_classification(raw, tokenizer, config.data, seed=seed)
    steps = total_steps(arguments, len(data.train))
    if steps < 1:
        raise UserError("training.num_train_epochs and training.max_steps leave no step to train; raise one of them.")
    config.adalora.phase_steps(steps)
    require_evaluation_at_budget(arguments, config.adalora, steps)
    return Inputs(engine, arguments, raw, tokenizer, data, steps)


def load_model(config: RunConfig, label_names: list[str] | None = None) -> nn.Module:
    """Load the base model whole, in the dtype, with the attention and in the 4 bits that `config.model` names."""
    model_config = config.model
    if loading.is_streamed(model_config):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return loading.load_whole(loading.begin(config, device=device, label_names=label_names))
    options: dict[str, Any] = {
        "dtype": model_config.torch_dtype,
        "revision": model_config.revision,
        "trust_remote_code": model_config.trust_remote_code,
    }
    if model_config.attn_implementation:
        options["attn_implementation"] = model_config.attn_implementation
    factory: Any = AutoModelForCausalLM
    if config.task == "sequence_classification":
        if label_names is None:
            raise UserError("task=sequence_classification needs the names of the classes.")
        factory = AutoModelForSequenceClassification
        options["num_labels"] = len(label_names)
        options["id2label"] = dict(enumerate(label_names))
        options["label2id"] = {name: index for index, name in enumerate(label_names)}
    # transformers tables what does not fit over many lines; here it is one line, as an error or as a note.
    verbosity = hf_logging.get_verbosity()
    hf_logging.set_verbosity(hf_logging.CRITICAL)
    try:
        model, loaded = factory.from_pretrained(model_config.model_name_or_path, output_loading_info=True, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        if isinstance(error, SafetensorError):
            reason = f"damaged weights ({reason}); download the model again."
        raise UserError(f"model.model_name_or_path={model_config.model_name_or_path}: {reason}") from None
    except RuntimeError as error:
        if "mismatched_sizes" not in str(error):
            raise
        raise UserError(
            f"model.model_name_or_path={model_config.model_name_or_path}: the weights have other shapes than its "
            f"config.json says; use a config.json and weights that belong together."
        ) from None
    finally:
        hf_logging.set_verbosity(verbosity)
    if missing := sorted(loaded["missing_keys"]):
        rest = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        print(f"not in the checkpoint, newly initialised: {', '.join(missing[:3])}{rest}", flush=True)
    return model


def make_trainer(config: RunConfig, inputs: Inputs) -> AdaLoraSFTTrainer | AdaLoraTrainer:
    """Load the model, inject the adapters, and build the trainer of the task."""
    arguments = inputs.arguments
    set_seed(arguments.seed)  # a new classifier head and the adapters start equal on every rank
    zero3 = zero3_options()
    with whole_weights():
        training = check_training_section(config)
        asked = training.get("resume_from_checkpoint")
        checkpoint = choose_checkpoint(asked, Path(training["output_dir"]))
        model = place_model(config, inputs, zero3, checkpoint)
    if arguments.process_index == 0:
        print(coverage(model), flush=True)
        if loading.is_streamed(config.model):
            print(loading.describe(model), flush=True)
    if config.task == "causal_lm":
        trainer: AdaLoraSFTTrainer | AdaLoraTrainer = AdaLoraSFTTrainer(
            model,
            args=arguments,
            train_dataset=inputs.data.train,
            eval_dataset=inputs.data.eval,
            processing_class=inputs.tokenizer,
        )
    else:
        trainer = AdaLoraTrainer(
            model,
            args=arguments,
            train_dataset=inputs.data.train,
            eval_dataset=inputs.data.eval,
            processing_class=inputs.tokenizer,
            data_collator=DataCollatorWithPadding(inputs.tokenizer),
            compute_metrics=accuracy,
        )
    trainer.asked_engine = inputs.engine.name
    trainer.checkpoints.run_identity = run_identity(config)
    trainer.checkpoints.allowed_changes = training.get("resume_allow_changed") or []
    trainer.checkpoints.resumed = checkpoint
    trainer.args.resume_from_checkpoint = None  # chosen above, for good
    use_console(trainer)
    return trainer


def _fit_ranks(model: nn.Module, config: RunConfig, inputs: Inputs, checkpoint: Checkpoint | None) -> None:
    if checkpoint is not None:
        asked = check_training_section(config).get("resume_compact")
        compact_for(checkpoint, model, asked=asked, exact=continues_exactly(checkpoint, inputs))


def continues_exactly(checkpoint: Checkpoint, inputs: Inputs) -> bool:
    """Return whether ranks, engine and micro-batch are those of the checkpoint, so that sums come in the same order."""
    arguments, saved = inputs.arguments, checkpoint.manifest
    names = {"ddp": ("one process", "ddp"), "fsdp2": ("fsdp2", "hsdp"), "deepspeed": ("zero1", "zero2", "zero3")}
    batch = [arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps]
    same_engine = saved["engine"] in names[inputs.engine.name]
    return same_engine and saved["world_size"] == arguments.world_size and saved["micro_batch"] == batch


def run_identity(config: RunConfig) -> dict[str, Any]:
    """Return the config's keys that decide what is trained, beside those a trainer knows; paths may move."""
    tree = config.to_dict()
    moving = ("model_name_or_path", "tokenizer_name_or_path", "train", "eval", "preprocessing_num_workers")
    keys = {
        f"{section}.{key}": value
        for section in ("model", "data")
        for key, value in tree[section].items()
        if key not in moving and not key.startswith(("eval", "max_eval"))
    }
    bf16 = computes_in_bf16(check_training_section(config))
    return keys | {"task": config.task, "training.bf16": bf16}


def place_model(
    config: RunConfig, inputs: Inputs, zero3: dict[str, Any] | None, checkpoint: Checkpoint | None = None
) -> nn.Module:
    """Return the base model with its adapters, where the engine wants it, at the ranks of a checkpoint to continue.

    4-bit bases, and bases that FSDP2 or ZeRO-3 shard, stream from their files; others, and 16-bit ones that cannot be
    streamed, are loaded whole by transformers.
    """
    device = inputs.arguments.device
    fsdp2 = inputs.engine.name == "fsdp2"

    def shard(model: nn.Module) -> None:
        bf16 = computes_in_bf16(check_training_section(config))
        shard_fsdp2(model, inputs.engine.fsdp2, device_type=device.type, bf16=bf16)

    started = _begin_streaming(config, inputs) if fsdp2 or zero3 or loading.is_streamed(config.model) else None
    if started is None:
        model = load_model(config, inputs.raw.label_names)
        inject_adalora(model, adalora_config_for(config, model))
        _fit_ranks(model, config, inputs, checkpoint)
        if fsdp2:
            shard(model)
        return model
    loading.inject(started, adalora_config_for(config, started.model))
    _fit_ranks(started.model, config, inputs, checkpoint)
    if fsdp2:
        storage = torch.device("cpu") if inputs.engine.fsdp2.cpu_offload else device
        return loading.load_sharded(started, shard, storage)
    if zero3:
        dtype = torch.bfloat16 if inputs.arguments.bf16 else torch.float16 if inputs.arguments.fp16 else None
        blocks = transformer_blocks(started.model)
        return loading.load_partitioned(started, blocks, lambda own: partition_zero3(own, zero3), dtype)
    return loading.load_whole(started)


def _begin_streaming(config: RunConfig, inputs: Inputs) -> loading.Loading | None:
    """Begin to stream the base; None, with a note, for a 16-bit base whose files need transformers to load them."""

    def new_heads(model: nn.Module) -> list[str]:
        if config.task != "sequence_classification":
            return []
        return modules_to_save(model, adalora_config_for(config, model))

    device, labels = inputs.arguments.device, inputs.raw.label_names
    try:
        return loading.begin(config, device=device, label_names=labels, new_heads=new_heads)
    except Unsupported as reason:
        if loading.is_streamed(config.model):
            raise
        if inputs.arguments.process_index == 0:
            print(f"every rank loads the base whole: {reason}", flush=True)
        return None


def adalora_config_for(config: RunConfig, model: nn.Module) -> AdaLoraConfig:
    """Return the adalora section, with a new classifier head in modules_to_save unless the user named some."""
    adalora = config.adalora
    if config.task != "sequence_classification" or adalora.modules_to_save is not None:
        return adalora
    heads = [name for name, _ in model.named_children() if name in ("classifier", "score", "classification_head")]
    if not heads:
        raise UserError(
            f"cannot tell the classifier head of {type(model).__name__}; name it in adalora.modules_to_save."
        )
    return adalora.replace(modules_to_save=heads)


def _check_output_dir(training: dict[str, Any]) -> None:
    """Refuse to mix two runs in one folder. Rank 0 alone looks, because it alone writes there later."""
    directory = Path(training["output_dir"])
    if os.environ.get("RANK", "0") != "0":
        return
    if directory.exists() and not directory.is_dir():
        raise UserError(f"training.output_dir={directory} is a file; name a folder.")
    found = [name for name in _RUN_FILES if (directory / name).exists()]
    found += [path.name for path in directory.glob("checkpoint-*")]
    if found and not training.get("overwrite_output_dir", False) and not training.get("resume_from_checkpoint"):
        raise UserError(
            f"training.output_dir={directory} holds another run ({found[0]}). Go on with it by "
            f"training.resume_from_checkpoint=auto, choose another folder, or pass training.overwrite_output_dir=true."
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".write-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"training.output_dir={directory} cannot be written: {error.strerror}.") from None


def check_model_path(config: RunConfig) -> None:
    """Read config.json (or ask the hub) before rows are tokenised."""
    path = config.model.model_name_or_path
    if (path.startswith((".", "/", "~")) or path.count("/") > 1) and not Path(path).is_dir():
        raise UserError(f"model.model_name_or_path={path} is not a folder.")
    try:
        AutoConfig.from_pretrained(
            path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.model_name_or_path={path}: {reason}") from None


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `config.model` names, with a padding token."""
    path = config.model.tokenizer_name_or_path or config.model.model_name_or_path
    key = "tokenizer_name_or_path" if config.model.tokenizer_name_or_path else "model_name_or_path"
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"model.{key}={path}: no tokenizer ({reason})") from None
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _final_evaluation(trainer: AdaLoraSFTTrainer | AdaLoraTrainer) -> dict[str, float]:
    """Evaluate the final adapter, unless training's last step did."""
    if trainer.args.load_best_model_at_end:
        return trainer.evaluate()
    for record in trainer.state.log_history:
        if record["step"] == trainer.state.global_step and "eval_loss" in record:
            return record
    return trainer.evaluate()


def _write_run(
    config: RunConfig,
    inputs: Inputs,
    trainer: AdaLoraSFTTrainer | AdaLoraTrainer,
    final: dict[str, float],
    started: float,
) -> dict[str, Any]:
    allocator = trainer.allocator
    summary = {
        "config": config.to_dict(),
        "versions": versions(),
        "hardware": hardware(),
        "engine": trainer.engine,
        "world_size": trainer.args.world_size,
        "total_step": inputs.steps,
        "coverage": vars(coverage(trainer.accelerator.unwrap_model(trainer.model))),
        "data": inputs.data.report,
        "final": final,
        "ranks": allocator.ranks() if allocator else {},
        "wall_time_s": round(time.time() - started, 3),
        "peak_memory_by_rank": peak_memory_by_rank(),
        "torch_threads": torch.get_num_threads(),
    }
    if trainer.is_world_process_zero():
        write_json(Path(config.training["output_dir"]) / RUN_NAME, summary)
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    return summary
