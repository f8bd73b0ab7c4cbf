"""The tables of docs/support.md: what their rows and columns are, whatever tests there are.

Engines, tasks and export forms are the package's own lists, so that a new one stands there as untested.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from adalora_scale.config.options import TaskName
from adalora_scale.engines.registry import ENGINES
from adalora_scale.export.command import FORMATS

FLOAT32, HALF, FOUR_BIT, STORED, OTHERS = (
    "float32",
    "bfloat16",
    "4-bit, made while loading",
    "4-bit checkpoint",
    "other quantised checkpoint",
)
FORMS = [form for name in FORMATS for form in ([name, f"{name} --uniform"] if name == "peft-lora" else [name])]
FEATURES = (
    "a loop of your own",
    "equals the float64 reference on 2, 3 and 4 ranks (HSDP: on 4)",
    "gradient accumulation",
    "gradient checkpointing",
    "gradient clipping",
    "bf16 training",
    "CPU offload",
    "a base streamed from its files",
    "trained output head or embedding, new tokens",
    "embeddings and convolutions adapted",
    "experts of a mixture adapted (equals the float64 reference)",
    "the same over experts in 4 bits",
    "killed over experts in 4 bits, same end",
    "best checkpoint at the end",
    "resumed bit for bit on as many ranks",
    "a checkpoint of it goes on elsewhere",
    "goes on from a checkpoint of another engine or number of ranks",
    "asynchronous checkpoints",
    "stopped by a signal",
    "killed and damaged at random, same end",
    "a step that is not finite changes nothing, on any rank",
    "a wrong end is an error on every rank",
    "going on from an adapter",
    "adapters frozen after attach",
    "scores recorded are those ranked",
    "AdaLoraCallback in a stock trainer",
    "save_model and checkpoints of a stock trainer",
)
TAKEN = (
    "AdaLoRA of a language model",
    "AdaLoRA of a classifier",
    "over a 4-bit base",
    "embeddings, convolutions",
    "new tokens",
    "checkpoint-N",
    "cut by --prune-to",
    "plain LoRA of PEFT",
    "AdaLoRA of PEFT",
)


@dataclass(frozen=True)
class Table:
    """One kind of combination. A mark of that name gives a value for each axis."""

    title: str
    text: str
    axes: dict[str, tuple[str, ...]]
    """Axis → its values, in the order shown: rows, columns, and where there are three a table for each of the first."""


TABLES = {
    "training": Table(
        "Training",
        "A run of `launch/train.py`, or of the trainers it uses, whose weights, masks or losses are compared with "
        "another's.",
        {
            "task": get_args(TaskName),
            "engine": tuple(ENGINES),
            "base": (FLOAT32, HALF, FOUR_BIT, STORED, OTHERS),
        },
    ),
    "features": Table(
        "Features by engine",
        "With a small model on real processes; a run through the trainers where the row does not say otherwise.",
        {"feature": FEATURES, "engine": tuple(ENGINES)},
    ),
    "exports": Table(
        "Export forms by what is exported",
        "The form is opened by PEFT, transformers or this package, and computes what the adapter did.",
        {"form": tuple(FORMS), "of": TAKEN},
    ),
}
