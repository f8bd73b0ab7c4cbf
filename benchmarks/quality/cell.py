"""One training: a task, a method, a budget, a learning rate and a seed; what it came to, as JSON."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from transformers import Trainer

from adalora_scale.config import RunConfig, load_config
from adalora_scale.errors import WrongEnd
from adalora_scale.placing.model import load_model
from adalora_scale.training.run import Inputs, prepare
from benchmarks.quality.method import SCALE, Method, Setting, budget_of
from benchmarks.quality.tasks import QualityTask, Sources, json_lines, write_splits

DIVERGED = 1e9
"""The loss of a run that is not a number any more; JSON knows no infinity."""
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


@dataclass(frozen=True)
class Cell:
    """A training: a trial of a learning rate, or a chosen one on a seed that counts."""

    task: str
    method: str
    target_r: int
    learning_rate: float
    seed: int
    final: bool
    """Whether the setting was chosen; only then the test split is computed on."""
    scale: float = SCALE

    def __str__(self) -> str:
        """Return what progress says."""
        kind = f"seed {self.seed}" if self.final else "trial"
        scale = f" scale {self.scale:g}" if self.scale != SCALE else ""
        return f"{self.task} {self.method} r {self.target_r} lr {self.learning_rate:g}{scale} {kind}"


class Results:
    """What is known of cells: one file of JSON lines a task, only ever appended to, by several processes at a time."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, task: str) -> dict[Cell, dict[str, Any]]:
        """Return a task's results by cell."""
        path = self._folder / f"{task}.jsonl"
        rows = json_lines(path) if path.exists() else []
        names = {key.name for key in fields(Cell)}
        return {Cell(**{key: value for key, value in row.items() if key in names}): row for row in rows}

    def add(self, cell: Cell, figures: dict[str, Any]) -> None:
        """Append a result."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / f"{cell.task}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(cell) | figures) + "\n")  # one write: lines of two processes do not mix


def run_cell(cell: Cell, task: QualityTask, method: Method, sources: Sources, work: Path) -> dict[str, Any]:
    """Train, bring the adapter to its budget, evaluate, and return the figures.

    Args:
        cell, task, method: what to train.
        sources: where models and data are.
        work: a folder for splits, tokens and the run, which nothing else writes to.
    """
    started = time.monotonic()
    try:
        trained = train_cell(cell, task, method, sources, work)
    except WrongEnd as error:  # our trainers stop a run whose gradients are not numbers any more
        lost = {"loss": DIVERGED, "accuracy": 0.0, "count": 0}
        ended = {"validation": lost, "parameters": 0, "budget": 1, "reason": str(error)}
        return ended | ({"test": lost} if cell.final else {}) | {"seconds": round(time.monotonic() - started, 1)}
    trainer, config, inputs = trained.trainer, trained.config, trained.inputs
    budget = budget_of(load_model(config, label_names=inputs.raw.label_names), config, cell.target_r)
    method.finish(trainer, budget)
    figures: dict[str, Any] = {"validation": evaluate(trainer)}
    if trained.test is not None:
        trainer.eval_dataset = trained.test
        figures["test"] = evaluate(trainer)
    return figures | {
        "parameters": method.parameters(trainer),
        "budget": budget,
        "steps": trainer.state.global_step,
        "train_tokens": inputs.data.report.get("train_tokens"),
        "seconds": round(time.monotonic() - started, 1),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


@dataclass
class Trained:
    """A training that has just ended."""

    trainer: Trainer
    config: RunConfig
    inputs: Inputs
    test: Any
    """The test split; None in a trial."""


def train_cell(cell: Cell, task: QualityTask, method: Method, sources: Sources, work: Path) -> Trained:
    """Train; arguments as `run_cell`."""
    files = write_splits(task, sources, work / "data")
    setting = Setting(cell.target_r, cell.learning_rate, cell.seed, task.steps, cell.scale)
    config = config_of(task, method, setting, files, sources, work)
    test = None
    if cell.final:  # before the run's own inputs: preparing sets up accelerate's state anew
        test = prepare(replace(config, data=replace(config.data, eval=str(files["test"])))).data.eval
    inputs = prepare(config)
    trainer = method.trainer(config, inputs, setting)
    trainer.train()
    return Trained(trainer, config, inputs, test)


def config_of(
    task: QualityTask,
    method: Method,
    setting: Setting,
    files: dict[str, Path],
    sources: Sources,
    work: Path,
) -> RunConfig:
    """Return the run's config: the same for every method but for the `adalora` section and the learning rate."""
    path = work / "run.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        yaml.safe_dump(
            {
                "task": task.kind,
                "model": {"model_name_or_path": task.model(sources), "torch_dtype": "float32"},
                "data": {"train": str(files["train"]), "eval": str(files["validation"]), **task.data},
                "adalora": {"guard_every": 0, **method.section(setting)},
                "training": {
                    "output_dir": str(work / "run"),
                    "overwrite_output_dir": True,
                    "per_device_train_batch_size": task.batch,
                    "per_device_eval_batch_size": 64,
                    "max_steps": setting.steps,
                    "learning_rate": setting.learning_rate,
                    "lr_scheduler_type": "cosine",
                    "warmup_steps": round(0.06 * setting.steps),
                    "weight_decay": 0.0,
                    "max_grad_norm": 1.0,
                    "seed": setting.seed,
                    "save_strategy": "no",
                    "eval_strategy": "no",
                    "logging_steps": setting.steps,
                    "report_to": "none",
                    "bf16": False,  # also on a GPU, where true is the trainers' default
                    "disable_tqdm": True,
                    **task.training,
                },
            }
        ),
        "utf-8",
    )
    return load_config(path)


@torch.no_grad()
def evaluate(trainer: Trainer) -> dict[str, float]:
    """Return the loss in nats (a token, or a row of a classifier) and the accuracy, over the whole split.

    The sum over tokens is divided by their number, so that the size of a batch does not matter.
    """
    model: Any = trainer.model
    model.eval()
    loss = right = count = 0.0
    for batch in trainer.get_eval_dataloader():
        labels = batch.pop("labels")
        logits = model(**{key: batch[key] for key in _INPUTS if key in batch}).logits
        if labels.dim() == 2:
            logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss += F.cross_entropy(logits.float(), labels, ignore_index=-100, reduction="sum").item()
        counted = labels != -100
        right += (logits.argmax(-1) == labels)[counted].sum().item()
        count += counted.sum().item()
    return {"loss": loss / count if math.isfinite(loss) else DIVERGED, "accuracy": right / count, "count": int(count)}
