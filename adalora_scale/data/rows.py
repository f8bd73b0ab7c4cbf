"""Rows of training and evaluation data: read, recognised and validated before any model or tokenizer is loaded.

    raw = load_raw(config.data, wanted_rows(find_task(config.task)), seed=42)

Whatever the columns are called in the file, the result has those of its layout:

| layout            | columns                                                           |
|-------------------|-------------------------------------------------------------------|
| messages          | `messages`: a list of {role, content}                             |
| prompt_completion | `prompt`, `completion`                                            |
| text              | `text`                                                            |
| classification    | `text`, `label` (an index into `label_names`)                     |
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import datasets
import pyarrow as pa

from adalora_scale.config import DataConfig
from adalora_scale.data.row_checks import column_is_valid, value_problem
from adalora_scale.data.row_files import BUILDERS, first_line, is_local, iterate_rows, read_file
from adalora_scale.errors import UserError

Layout = Literal["messages", "prompt_completion", "text", "classification"]
LossTarget = Literal["all", "completion", "assistant"]

LAYOUT_COLUMNS: dict[Layout, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "classification": ("text", "label"),
    "text": ("text",),
}
_NUMBER = re.compile(r"-?\d+(\.\d+)?")


@dataclass(frozen=True)
class RawData:
    """Validated rows of one layout, not yet tokenised."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    layout: Layout
    label_names: list[str] | None
    """Classification: the class of each label index."""


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a task trains on; `tasks.registry.wanted_rows` says it, so that this room knows no task."""

    task: str
    """The task's name, for messages."""
    layouts: tuple[Layout, ...]
    """Layouts that it takes."""
    takers: Mapping[Layout, str]
    """For every layout the name of a task that takes it."""


@dataclass(frozen=True)
class _Source:
    """One file or hub split, and a walk over its rows that can say where each one is."""

    name: str
    dataset: datasets.Dataset
    rows: Callable[[], Iterator[tuple[str, Mapping[str, Any]]]]


def load_raw(config: DataConfig, wanted: Wanted, *, seed: int) -> RawData:
    """Read, validate and normalise the data of a run.

    Args:
        config: the `data` section.
        wanted: which layouts the task trains on.
        seed: shuffles the rows before `eval_fraction` of them are held out.

    Raises:
        UserError: a file, row, column or label cannot be used; one line that names it and the fix.
    """
    train_sources = _open(config.train, config, config.train_split)
    layout = _recognise(train_sources[0], config, wanted)
    train = _normalise(train_sources, layout, config)
    held_out: datasets.Dataset | None = None
    eval_sources: list[_Source] = []
    if config.eval is not None:
        eval_sources = _open(config.eval, config, config.eval_split)
        held_out = _normalise(eval_sources, layout, config)
    label_names = None
    if layout == "classification":
        names = _label_texts(train)
        # Over all rows, so that max_train_samples of a file sorted by class does not lose classes.
        label_names = sorted(set(names), key=_label_order(names))
        train = _encode_labels(train, label_names, train_sources)
        held_out = _encode_labels(held_out, label_names, eval_sources) if held_out is not None else None
    else:
        loss_target(config, layout)
    if config.eval_fraction:
        train, held_out = _split(train, config.eval_fraction, seed)
    return RawData(
        train=_first(train, config.max_train_samples),
        eval=_first(held_out, config.max_eval_samples) if held_out is not None else None,
        layout=layout,
        label_names=label_names,
    )


def loss_target(config: DataConfig, layout: Layout) -> LossTarget:
    """Return which tokens of a causal-LM row count in the loss, resolving ``data.loss_on=auto``.

    Raises:
        UserError: `data.loss_on` names something rows of this layout do not have.
    """
    own: dict[Layout, LossTarget] = {"messages": "assistant", "prompt_completion": "completion", "text": "all"}
    if config.loss_on == "auto":
        return own[layout]
    if config.loss_on not in ("all", own[layout]):
        choices = " or ".join(dict.fromkeys((own[layout], "all")))
        raise UserError(f"data.loss_on={config.loss_on} does not fit {layout} rows; use {choices}.")
    return config.loss_on


def _open(sources: str | list[str], config: DataConfig, split: str) -> list[_Source]:
    names = [sources] if isinstance(sources, str) else sources
    if not names:
        raise UserError("data.train and data.eval need at least one file or hub id; the list is empty.")
    opened = [_open_file(name) if is_local(name) else _open_hub(name, config.name, split) for name in names]
    for source in opened:
        if source.dataset.num_rows == 0:
            raise UserError(f"{source.name} has no rows.")
    return opened


def _open_file(name: str) -> _Source:
    return _Source(name, read_file(name), lambda: iterate_rows(name))


def _open_hub(name: str, configuration: str | None, split: str) -> _Source:
    try:
        dataset = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # network, missing repository, missing configuration, missing split, script refusal …
        raise UserError(
            f"cannot load the hub data set '{name}' (data.name={configuration}, split {split}): "
            f"{type(error).__name__}: {first_line(error)} A local file must exist and end in {', '.join(BUILDERS)}."
        ) from None
    where = f"{name}[{split}]"

    def rows() -> Iterator[tuple[str, Mapping[str, Any]]]:
        return ((f"{where} row {index}", row) for index, row in enumerate(dataset, start=1))

    return _Source(where, dataset, rows)


def _recognise(source: _Source, config: DataConfig, wanted: Wanted) -> Layout:
    found = source.dataset.column_names
    fitting = [layout for layout in LAYOUT_COLUMNS if all(c in found for c in _user_columns(layout, config))]
    if config.format != "auto":
        layout: Layout = config.format
    elif len(wanted.layouts) == 1:
        layout = wanted.layouts[0]
    elif fitting:
        layout = fitting[0]
    else:
        raise UserError(
            f"{source.name}: no known layout in the columns {', '.join(found)}. Name them: data.messages_column; or "
            "data.prompt_column and data.completion_column; or data.text_column (and data.label_column)."
        )
    if layout in wanted.layouts:
        return layout
    if len(wanted.layouts) == 1:
        columns = " and ".join(LAYOUT_COLUMNS[wanted.layouts[0]])
        raise UserError(f"task={wanted.task} needs {columns} columns, but data.format={layout}.")
    alone = ", or data.format=text to train on the text alone" if "text" in wanted.layouts else ""
    raise UserError(
        f"{source.name} is {layout} data (columns {', '.join(_user_columns(layout, config))}): set "
        f"task={wanted.takers[layout]}{alone}."
    )


def _user_columns(layout: Layout, config: DataConfig) -> dict[str, str]:
    """The user's column name -> the name this package gives it."""
    return {getattr(config, f"{column}_column"): column for column in LAYOUT_COLUMNS[layout]}


def _normalise(sources: list[_Source], layout: Layout, config: DataConfig) -> datasets.Dataset:
    columns = _user_columns(layout, config)
    parts = []
    for source in sources:
        for name, column in columns.items():
            if name not in source.dataset.column_names:
                found = ", ".join(source.dataset.column_names)
                raise UserError(f"{source.name} has no column '{name}' (it has {found}); set data.{column}_column.")
        part = source.dataset.select_columns(list(columns))
        for name, column in columns.items():
            if not column_is_valid(part, name, column):
                _raise_bad_row(source, columns)
        renames = {name: column for name, column in columns.items() if name != column}
        parts.append(part.rename_columns(renames) if renames else part)
    try:
        return datasets.concatenate_datasets([_plain_strings(part) for part in parts])
    except (ValueError, TypeError, pa.ArrowInvalid) as error:
        names = ", ".join(source.name for source in sources)
        raise UserError(f"the columns of {names} have different types: {first_line(error)}") from None


def _plain_strings(dataset: datasets.Dataset) -> datasets.Dataset:
    """Give text columns one type, whatever the file's writer chose, so that files can be joined."""
    features = dataset.features.copy()
    for column in ("prompt", "completion", "text"):
        if column in features:
            features[column] = datasets.Value("string")
    return dataset if features == dataset.features else dataset.cast(features)


def _raise_bad_row(source: _Source, columns: dict[str, str]) -> None:
    for where, row in source.rows():
        for name, column in columns.items():
            problem = "is missing" if row.get(name) is None else value_problem(row[name], column)
            if problem:
                raise UserError(f"{where}: column '{name}' {problem}.")
    types = ", ".join(f"{name}: {source.dataset.features[name]}" for name in columns)
    raise UserError(f"{source.name}: a column was read with an unexpected type ({types}).")


def _label_texts(dataset: datasets.Dataset) -> list[str]:
    feature = dataset.features["label"]
    if isinstance(feature, datasets.ClassLabel):
        # Hub test splits without labels hold -1, which no name belongs to.
        return [feature.names[i] if 0 <= i < len(feature.names) else str(i) for i in dataset["label"]]
    return [str(int(label)) if isinstance(label, float) else str(label) for label in dataset["label"]]


def _label_order(names: list[str]) -> Callable[[str], tuple[float, str]]:
    if all(_NUMBER.fullmatch(name) for name in names):
        return lambda name: (float(name), name)
    return lambda name: (0.0, name)


def _encode_labels(dataset: datasets.Dataset, label_names: list[str], sources: list[_Source]) -> datasets.Dataset:
    index = {name: i for i, name in enumerate(label_names)}
    names = _label_texts(dataset)
    for row, name in enumerate(names):
        if name not in index:
            for source in sources:
                if row < source.dataset.num_rows:
                    where, _ = next(islice(source.rows(), row, None))
                    raise UserError(
                        f"{where}: label '{name}' does not occur among the {len(index)} classes of the training data; "
                        "correct the row, or add rows of that class to data.train."
                    )
                row -= source.dataset.num_rows
    return dataset.remove_columns("label").add_column("label", [index[name] for name in names])


def _split(dataset: datasets.Dataset, fraction: float, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    try:
        parts = dataset.train_test_split(test_size=fraction, seed=seed)
    except ValueError as error:
        raise UserError(
            f"data.eval_fraction={fraction} of {dataset.num_rows} rows leaves nothing: {first_line(error)}"
        ) from None
    return parts["train"], parts["test"]


def _first(dataset: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    return dataset if limit is None or limit >= dataset.num_rows else dataset.select(range(limit))
