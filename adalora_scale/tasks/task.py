"""What a task is to the rest of the package: the model, the rows, the trainer, and what PEFT and `plan` must know.

Vendor classes that take seconds to import are imported inside the methods that return them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from adalora_scale.config import DataConfig

if TYPE_CHECKING:
    from transformers import PretrainedConfig, Trainer, TrainingArguments

    from adalora_scale.data.preparing import Prepared
    from adalora_scale.data.row_values import Layout
    from adalora_scale.data.rows import RawData


class Task(ABC):
    """One kind of training, without state; a task's file ends in `TASK`, its one object."""

    name: ClassVar[str]
    """The user's value of `task`, and the name of its file."""
    peft_type: ClassVar[str]
    """PEFT's name of the task, in adapter_config.json."""
    layouts: ClassVar[tuple[Layout, ...]]
    """Layouts of rows that it trains on."""
    has_labels: ClassVar[bool] = False
    """Whether rows name classes: the model then gets their names, and a head of its own that is trained in full."""
    generates: ClassVar[bool] = False
    """Whether the model writes text: `evaluate` and the generation config need it."""
    ignores_num_items: ClassVar[bool] = False
    """Whether transformers' models take `num_items_in_batch` and do nothing with it (see `AdaLoraTrainerMixin`)."""

    # ---- the model ----------------------------------------------------------------------------------------------

    @abstractmethod
    def auto_class(self) -> Any:
        """Return transformers' class with `from_pretrained` and `from_config`."""

    @abstractmethod
    def builds(self, class_name: str) -> bool:
        """Whether models of a class of this name are this task's."""

    def label_options(self, label_names: list[str] | None) -> dict[str, Any]:
        """Return the attributes of the model's config that hold the classes' names.

        Raises:
            UserError: the task has classes, and they are not known.
        """
        return {}

    def new_heads(self, model: nn.Module) -> list[str]:
        """Name the modules that a checkpoint need not hold and that are trained in full unless the user names some.

        Raises:
            UserError: the task has a head and cannot tell which module it is.
        """
        return []

    def opened_in_full(self, model: nn.Module) -> list[str]:
        """Name the modules that PEFT trains in full, and looks for in a file, whatever an adapter's config says."""
        return []

    def label_count(self, trained: Mapping[str, tuple[int, ...]]) -> int | None:
        """Return the number of classes, read off the shapes of the tensors that were trained in full."""
        return None

    # ---- the rows -----------------------------------------------------------------------------------------------

    @abstractmethod
    def prepare(
        self, raw: RawData, tokenizer: Any, data: DataConfig, *, seed: int, cache_dir: Path | None = None
    ) -> Prepared:
        """Tokenise rows of one of `layouts`; the tokenizer is left as it must be saved with the adapter.

        Raises:
            UserError: the rows, the tokenizer and the options do not fit together.
        """

    # ---- the trainer --------------------------------------------------------------------------------------------

    @abstractmethod
    def trainer_class(self) -> type[Trainer]:
        """Return the vendor's trainer."""

    @abstractmethod
    def arguments_class(self) -> type[TrainingArguments]:
        """Return the vendor's class of training arguments; its fields are the keys of `training:`."""

    def settle_arguments(self, options: dict[str, Any], data: DataConfig) -> None:  # noqa: B027 (most tasks add nothing)
        """Add what prepared rows ask of the training arguments."""

    def check_labels(self, label_names: list[str] | None, arguments: TrainingArguments) -> None:  # noqa: B027 (most tasks have none)
        """See that the rows' labels can be learnt under these arguments.

        Raises:
            UserError: they cannot.
        """

    def trainer_options(self, tokenizer: Any, label_names: list[str] | None = None) -> dict[str, Any]:
        """Return the trainer's further keywords: collator, metrics."""
        return {}

    def higher_is_better(self, label_names: list[str] | None = None) -> dict[str, bool]:
        """Return the figures of an evaluation, and whether the higher value of each is the better one."""
        return {"loss": False}

    # ---- the plan -----------------------------------------------------------------------------------------------

    def complete_shape(self, shape: PretrainedConfig) -> None:  # noqa: B027 (most tasks add nothing)
        """Put into a model's config what training takes from the tokenizer, which `plan` does not load."""

    def prepare_trace(self, model: nn.Module, *, whole_logits: bool) -> None:  # noqa: B027 (most tasks add nothing)
        """Change the model as the trainer does before its first step."""

    @abstractmethod
    def trace_batch(self, sequences: int, length: int, *, whole_logits: bool, masked: bool) -> dict[str, Any]:
        """Return the keywords of one training forward; the sizes count, the values do not.

        Args:
            sequences, length: of the micro-batch, (sequences, length) tokens.
            whole_logits: the loss is computed from all logits at once.
            masked: the attention takes a mask.
        """
