"""Models that give a text one class, several, or a number: a new head over the base, trained beside the adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from adalora_scale.config import DataConfig
from adalora_scale.data.labels import LabelKind, kind_of
from adalora_scale.errors import UserError
from adalora_scale.messages import quoted
from adalora_scale.tasks.label_metrics import HIGHER_IS_BETTER, METRICS
from adalora_scale.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PretrainedConfig, Trainer, TrainingArguments

    from adalora_scale.data.preparing import Prepared
    from adalora_scale.data.row_values import Layout
    from adalora_scale.data.rows import RawData

_HEADS = ("classifier", "score", "classification_head")
_ENDINGS = ("classifier", "score")
"""PEFT's `PeftModelForSequenceClassification` takes a module whose name ends so for the head: `pre_classifier` too."""
_PROBLEM: dict[LabelKind, str] = {
    "classes": "single_label_classification",
    "numbers": "regression",
    "several": "multi_label_classification",
}
"""transformers' `problem_type`, which decides the loss."""
_LAST_LAYERS = ("classifier", "score", "out_proj", "linear_out", "logits_proj", "summary")
"""Layers that give a number a class, the surest first: XLNet has `logits_proj` behind `summary`, XLM has no other."""


class SequenceClassification(Task):
    """`task=sequence_classification`."""

    name: ClassVar[str] = "sequence_classification"
    peft_type: ClassVar[str] = "SEQ_CLS"
    layouts: ClassVar[tuple[Layout, ...]] = ("classification",)
    has_labels: ClassVar[bool] = True
    ignores_num_items: ClassVar[bool] = True

    def auto_class(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        return AutoModelForSequenceClassification

    def builds(self, class_name: str) -> bool:
        return "SequenceClassification" in class_name

    def label_options(self, label_names: list[str] | None) -> dict[str, Any]:
        if label_names is None:
            raise UserError(f"task={self.name} needs the names of the classes.")
        return {
            "num_labels": len(label_names),  # first: setting it renames the classes
            "id2label": dict(enumerate(label_names)),
            "label2id": {name: index for index, name in enumerate(label_names)},
            "problem_type": _PROBLEM[kind_of(label_names)],  # said always: a base may have been trained for another
        }

    def new_heads(self, model: nn.Module) -> list[str]:
        heads = [name for name, _ in model.named_children() if name in _HEADS]
        if not heads:
            raise UserError(
                f"cannot tell the classifier head of {type(model).__name__}; name it in adalora.modules_to_save."
            )
        return heads

    def opened_in_full(self, model: nn.Module) -> list[str]:
        return [
            name
            for name, module in model.named_modules()
            if name.endswith(_ENDINGS) and next(module.parameters(), None) is not None
        ]

    def label_count(self, trained: Mapping[str, tuple[int, ...]]) -> int | None:
        sizes = {tuple(name.split(".")[-2:]): shape[0] for name, shape in trained.items() if shape}
        return next((sizes[last, "weight"] for last in _LAST_LAYERS if (last, "weight") in sizes), None)

    def prepare(
        self, raw: RawData, tokenizer: Any, data: DataConfig, *, seed: int, cache_dir: Path | None = None
    ) -> Prepared:
        from adalora_scale.data.tokenization import prepare_classification

        return prepare_classification(raw, tokenizer, data, seed=seed, cache_dir=cache_dir)

    def trainer_class(self) -> type[Trainer]:
        from transformers import Trainer

        return Trainer

    def arguments_class(self) -> type[TrainingArguments]:
        from transformers import TrainingArguments

        return TrainingArguments

    def settle_arguments(self, options: dict[str, Any], data: DataConfig) -> None:
        options.setdefault("include_num_input_tokens_seen", "non_padding")  # tokens_per_second needs it

    def check_labels(self, label_names: list[str] | None, arguments: TrainingArguments) -> None:
        kind = kind_of(label_names)
        if kind == "classes" and label_names is not None and len(label_names) < 2:
            raise UserError(
                f"every row of data.train has the label {quoted(label_names[0])}: there is nothing to tell apart. Look "
                f"at data.label_column; numbers as targets (regression) are data.labels=numbers."
            )
        if kind != "classes" and arguments.label_smoothing_factor:
            raise UserError(
                f"training.label_smoothing_factor is for one class a row, and data.labels are {kind}; remove it."
            )

    def trainer_options(self, tokenizer: Any, label_names: list[str] | None = None) -> dict[str, Any]:
        from transformers import DataCollatorWithPadding

        return {"data_collator": DataCollatorWithPadding(tokenizer), "compute_metrics": METRICS[kind_of(label_names)]}

    def higher_is_better(self, label_names: list[str] | None = None) -> dict[str, bool]:
        return {"loss": False} | HIGHER_IS_BETTER[kind_of(label_names)]

    def complete_shape(self, shape: PretrainedConfig) -> None:
        if getattr(shape, "pad_token_id", None) is None:
            shape.pad_token_id = 0  # training takes the tokenizer's; a batch needs one

    def trace_batch(self, sequences: int, length: int, *, whole_logits: bool, masked: bool) -> dict[str, Any]:
        return {
            "input_ids": torch.zeros(sequences, length, dtype=torch.long),
            "labels": torch.zeros(sequences, dtype=torch.long),
        }


TASK = SequenceClassification()
