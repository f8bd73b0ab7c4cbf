"""One training run, from a config to the files in its output_dir.

Cheap checks come first (keys, files, rows, schedule), the model is loaded when nothing foreseeable is left to fail.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from adalora_scale.adalora.injection import coverage
from adalora_scale.config import RunConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.data.digests import data_fingerprint
from adalora_scale.data.mixing import described
from adalora_scale.data.preparing import Prepared
from adalora_scale.data.rows import RawData, load_raw
from adalora_scale.engines.builds import bounded_build_waits
from adalora_scale.engines.engine import Engine
from adalora_scale.engines.ranks import together
from adalora_scale.engines.registry import engine_for
from adalora_scale.errors import UserError, WrongEnd
from adalora_scale.export.adapter_file import CONFIG_NAME, WEIGHTS_NAME
from adalora_scale.export.continual import check_start
from adalora_scale.export.model_card import remove_card
from adalora_scale.files import write_json
from adalora_scale.messages import say
from adalora_scale.placing import streaming
from adalora_scale.placing.model import place_model
from adalora_scale.placing.positions import note_on_positions
from adalora_scale.placing.tokens import embedding_rows, require_rows
from adalora_scale.reading.base_config import check_base, foreign, hub_hint, said_of
from adalora_scale.report.names import REPORT_NAME, RUN_NAME
from adalora_scale.tasks.registry import find_task, wanted_rows
from adalora_scale.training.arguments import (
    check_training_section,
    computes_in_bf16,
    global_batch,
    require_evaluation_at_budget,
    total_steps,
    training_arguments,
)
from adalora_scale.training.base_weights import BaseWeights
from adalora_scale.training.best import settle_best
from adalora_scale.training.choosing import check_asked_checkpoint, choose_checkpoint
from adalora_scale.training.console import use_console
from adalora_scale.training.continuing import rank_fitter, run_identity
from adalora_scale.training.dry_run import check_hub, check_loop, check_tokens, check_values, name_unused
from adalora_scale.training.first_example import say_first_example
from adalora_scale.training.first_look import look_at_model
from adalora_scale.training.lease import Lease
from adalora_scale.training.optimizers import check_optimizer
from adalora_scale.training.output_dir import hold_output_dir
from adalora_scale.training.output_store import forget_fetched
from adalora_scale.training.packages import check_packages
from adalora_scale.training.records import (
    WRONG_END_NAME,
    hardware,
    peak_memory_by_rank,
    versions,
)
from adalora_scale.training.reporting import leave_report, tensorboard_folder
from adalora_scale.training.run_card import write_run_card
from adalora_scale.training.same_rows import require_same_rows
from adalora_scale.training.soundness import MAX_SKIPPED_STEPS
from adalora_scale.training.stopping import stopping
from adalora_scale.training.trainers import AdaLoraSFTTrainer, AdaLoraTrainer, with_adalora
from adalora_scale.training.uploading import leaving, make_uploader

_RESULT = (RUN_NAME, CONFIG_NAME, WEIGHTS_NAME, REPORT_NAME)
"""What looks like a result."""


@dataclass
class Inputs:
    """Everything a run needs beside the model."""

    engine: Engine
    arguments: TrainingArguments
    raw: RawData
    tokenizer: PreTrainedTokenizerBase
    data: Prepared
    steps: int
    rows: int | None = None
    """Of the embedding, where the base's are too few."""


def train(config: RunConfig, lease: Lease | None = None) -> dict[str, Any]:
    """Train an adapter as `config` says, write the run's files, and return the content of run.json.

    Args:
        config: the run.
        lease: rank 0's hold on output_dir, where the caller has taken it already.

    Raises:
        UserError: the config, its files or its data cannot be used; or another run holds output_dir.
        Unsupported: the config asks for an engine or quantisation that is not there.
        WrongEnd: training cannot or did not leave an adapter that is right (wrong-end.json says why, too).
        Interrupted: a signal ended it.
    """
    started = time.time()
    training = check_training_section(config)
    directory = training["output_dir"]
    with stopping.a_run(), contextlib.nullcontext(lease) if lease is not None else hold_output_dir(training) as held:
        try:
            return _train(config, held, started)
        except WrongEnd as error:
            if held is not None:
                held.require()
                _leave_no_result(Path(directory), str(error))
            raise


def _leave_no_result(directory: Path, reason: str) -> None:
    """Write down why there is none, and take away what would look like one: written just now, or by an earlier run."""
    for name in _RESULT:
        (directory / name).unlink(missing_ok=True)
    remove_card(directory)
    with contextlib.suppress(UserError):  # of the two errors this is the lesser
        write_json(directory / WRONG_END_NAME, {"reason": reason})


def _train(config: RunConfig, lease: Lease | None, started: float) -> dict[str, Any]:
    with bounded_build_waits():  # DeepSpeed compiles operators when ranks join and when it takes the optimizer
        inputs = prepare(config)
        trainer = make_trainer(config, inputs)
        trainer.adalora_callback.lease = lease
        trainer.adalora_callback.reports = False  # once run.json is there
    with leaving(trainer.checkpoints.uploader, _RESULT):
        with bounded_build_waits():
            trainer.train()
        return _end(config, inputs, trainer, started)


def _end(
    config: RunConfig, inputs: Inputs, trainer: AdaLoraSFTTrainer | AdaLoraTrainer, started: float
) -> dict[str, Any]:
    """Evaluate, and write what the run leaves."""
    final: dict[str, float] = {}
    if inputs.data.eval is not None:
        with stopping.at_once("in the final evaluation"):
            final = _final_evaluation(trainer)
    if not math.isfinite(final.get("eval_loss", 0.0)):
        raise WrongEnd(
            f"the final evaluation's loss is {final['eval_loss']}: its forward overflows. Look at the rows of "
            f"data.eval, lower training.learning_rate, or compute in bfloat16 or float32."
        )
    trainer.save_model()
    summary = _write_run(config, inputs, trainer, final, started)
    if trainer.is_world_process_zero():
        forget_fetched(trainer.checkpoints.output_dir)
        leave_report(Path(config.training["output_dir"]), tensorboard=tensorboard_folder(trainer))
    trainer.checkpoints.finish_upload()
    return summary


def prepare(config: RunConfig) -> Inputs:
    """Check everything that can be checked without the model, and tokenise the data.

    Ranks wait for one another on a file lock while rows are tokenised, which no process group's timeout ends; they
    meet once after it, to see that all have the same rows.
    """
    engine = engine_for(config.engine)
    training = check_training_section(config)
    check_values(training)
    check_optimizer(training)
    check_packages(config, training, engine)
    asked, store = training.get("resume_from_checkpoint"), training.get("output_store")
    check_asked_checkpoint(asked, Path(training["output_dir"]), store=store)
    shape = check_model_path(config)
    if config.model.adapter_path:
        check_start(config.model.adapter_path, config.adalora)
    if config.model.load_in_4bit:
        streaming.quant_spec(config.model)
    seed = training.get("seed", 42)
    task = find_task(config.task)
    if config.data.streaming:
        _check_streaming(training)
    raw = load_raw(config.data, wanted_rows(task), seed=seed)
    arguments = training_arguments(config, engine)
    if raw.eval is None and arguments.eval_strategy != "no":
        raise UserError("training.eval_strategy needs evaluation data; set data.eval or data.eval_fraction.")
    if raw.eval is None and arguments.eval_on_start:
        raise UserError("training.eval_on_start needs evaluation data; set data.eval or data.eval_fraction.")
    task.check_labels(raw.label_names, arguments)
    settle_best(arguments, training, task.higher_is_better(raw.label_names))
    tokenizer = load_tokenizer(config)
    check_tokens(training, tokenizer)
    data = task.prepare(raw, tokenizer, config.data, seed=seed)
    require_same_rows(raw, data)
    with engine.loading():  # it builds the model, without weights: under ZeRO-3 transformers would partition it
        rows = require_rows(config, tokenizer, data, raw.label_names, main=arguments.process_index == 0)
    steps = total_steps(arguments, _examples(arguments, data))
    if data.stream is not None:
        data.stream.places = steps * global_batch(arguments)
        data.stream.embedding_rows = embedding_rows(config) if rows is None else rows
    if steps < 1:
        raise UserError("training.num_train_epochs and training.max_steps leave no step to train; raise one of them.")
    check_loop(arguments, steps)
    check_hub(arguments)
    if arguments.process_index == 0:
        name_unused(training, arguments)
    config.adalora.phase_steps(steps)
    require_evaluation_at_budget(arguments, config.adalora, steps)
    note = note_on_positions(config.data.max_length, shape, data)
    if arguments.process_index == 0 and note is not None:
        say(note)
    if arguments.process_index == 0 and training.get("show_example", True):
        say_first_example(config, data, raw, tokenizer, seed=seed)
    if data.mixture is not None and arguments.process_index == 0:
        say(*described(data.mixture, steps * global_batch(arguments)))
    return Inputs(engine, arguments, raw, tokenizer, data, steps, rows)


def _check_streaming(training: dict[str, Any]) -> None:
    if training.get("max_steps", -1) < 1:
        raise UserError("data.streaming=true needs training.max_steps: where the rows end is not known before.")
    if training.get("dataloader_num_workers"):
        raise UserError(
            f"training.dataloader_num_workers={training['dataloader_num_workers']} does not go with data.streaming: "
            "each would read all rows; set it to 0."
        )


def _examples(arguments: TrainingArguments, data: Prepared) -> int:
    """Return the rows (or packed sequences) of an epoch."""
    if data.mixture is None and data.stream is None:
        return len(data.train)
    if arguments.train_sampling_strategy != "random":
        raise UserError(
            f"training.train_sampling_strategy={arguments.train_sampling_strategy} is an order of its own, and so are "
            "data.streaming and the weights (or rows) in data.train; leave out one of them."
        )
    return len(data.train) if data.mixture is None else data.mixture.whole_batches(global_batch(arguments))


def make_trainer(config: RunConfig, inputs: Inputs) -> AdaLoraSFTTrainer | AdaLoraTrainer:
    """Load the model, inject the adapters, and build the trainer of the task."""
    arguments = inputs.arguments
    set_seed(arguments.seed)  # a new classifier head and the adapters start equal on every rank
    base_weights = BaseWeights(
        config.model.model_name_or_path, config.model.revision, arguments.process_index, arguments.world_size
    )
    with inputs.engine.loading() as engine:
        training = check_training_section(config)
        asked = training.get("resume_from_checkpoint")
        output_dir, store = Path(arguments.output_dir or "."), training.get("output_store")
        allowed = training.get("resume_allow_changed") or []
        checkpoint = choose_checkpoint(asked, output_dir, store=store, allowed=allowed)
        model = place_model(
            config,
            engine,
            arguments,
            label_names=inputs.raw.label_names,
            bf16=computes_in_bf16(training),
            fit_ranks=rank_fitter(config, arguments, engine, checkpoint),
            rows=inputs.rows,
        )
    if arguments.process_index == 0:
        say(coverage(model))
        if streaming.is_streamed(config.model):
            say(streaming.describe(model))
    task = find_task(config.task)
    trainer = with_adalora(task.trainer_class())(
        model,
        args=arguments,
        train_dataset=inputs.data.train,
        eval_dataset=inputs.data.eval,
        processing_class=inputs.tokenizer,
        **task.trainer_options(inputs.tokenizer, inputs.raw.label_names),
    )
    trainer.asked_engine = inputs.engine
    trainer.mixture = inputs.data.mixture
    trainer.checkpoints.run_identity = run_identity(config) | _order_identity(inputs)
    if inputs.data.stream is not None:
        trainer.train_dataset = inputs.data.stream  # SFTTrainer takes a table alone, and looks at its first row
    trainer.checkpoints.allowed_changes = allowed
    trainer.checkpoints.uploader = make_uploader(store, output_dir) if arguments.process_index == 0 else None
    trainer.checkpoints.async_save = training.get("async_save", False)
    trainer.adalora_callback.max_skipped_steps = training.get("max_skipped_steps", MAX_SKIPPED_STEPS)
    trainer.checkpoints.resumed = checkpoint
    trainer.checkpoints.base_weights = base_weights
    trainer.args.resume_from_checkpoint = None  # chosen above, for good
    use_console(trainer)
    return trainer


def _order_identity(inputs: Inputs) -> dict[str, Any]:
    """Return what must not change at a resume of how rows are drawn."""
    data, mixing = inputs.data, inputs.raw.mixing
    if data.stream is None:
        return {"data.mixing": data.mixture.identity() if data.mixture is not None else None}
    amounts = [part.amount for part in mixing.parts] if mixing is not None else None
    # Of rows that are not read yet nothing is known; the first ones stand for all.
    return {"data.mixing": amounts, "data_fingerprint": data_fingerprint(data.train)}


def check_model_path(config: RunConfig) -> PretrainedConfig:
    """Read config.json (or ask the hub) before rows are tokenised, and return it."""
    path = config.model.model_name_or_path
    look_at_model(config.model)
    with said_of(path):
        check_base(path, config.model.revision, attention=config.model.attn_implementation)
    try:
        with foreign(f"model.model_name_or_path={path}"):
            shape: PretrainedConfig = AutoConfig.from_pretrained(
                path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
            )
    except UserError as error:
        raise UserError(f"{error}{hub_hint(path, error)}") from None
    return shape


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that `config.model` names, with a padding token."""
    path = config.model.tokenizer_name_or_path or config.model.model_name_or_path
    key = "tokenizer_name_or_path" if config.model.tokenizer_name_or_path else "model_name_or_path"
    try:
        check_base(path, config.model.revision, attention=config.model.attn_implementation)
        with foreign("no tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(
                path, revision=config.model.revision, trust_remote_code=config.model.trust_remote_code
            )
    except UserError as error:
        raise UserError(f"model.{key}={path}: {error}{hub_hint(path, error)}") from None
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
        "data": inputs.data.report | _sources(inputs),
        "final": final,
        "ranks": allocator.ranks() if allocator else {},
        "budget": _budget(allocator) if allocator else None,
        "wall_time_s": round(time.time() - started, 3),
        "peak_memory_by_rank": peak_memory_by_rank(),
        "torch_threads": torch.get_num_threads(),
    }
    path = Path(config.training["output_dir"]) / RUN_NAME

    def write() -> None:
        if trainer.is_world_process_zero():
            trainer.adalora_callback.require_lease()
            write_json(path, summary)
            write_run_card(config, summary, [log["loss"] for log in trainer.state.log_history if "loss" in log])

    together(write)
    return summary


def _sources(inputs: Inputs) -> dict[str, Any]:
    if (mixture := inputs.data.mixture) is None:
        return {}
    return {"sources": mixture.report(inputs.steps * global_batch(inputs.arguments))}


def _budget(allocator: RankAllocator) -> dict[str, Any]:
    return {"unit": allocator.schedule.unit, "allowed": allocator.budget, "spent": allocator.spent}
