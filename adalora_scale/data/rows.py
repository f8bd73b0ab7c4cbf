"""Rows of training and evaluation data: read, recognised and validated before any model or tokenizer is loaded.

    raw = load_raw(config.data, wanted_rows(find_task(config.task)), seed=42)

Whatever the columns are called in the file, the result has those of its layout (`row_values.COLUMNS`):

| layout                  | columns                                                                               |
|-------------------------|---------------------------------------------------------------------------------------|
| messages                | `messages`: a list of {role, content, …}                                              |
| prompt_completion       | `prompt`, `completion`                                                                |
| prompt_completion_turns | `messages`, and `prompt_turns`: how many of them are the prompt                       |
| text                    | `text`                                                                                |
| classification          | `text`, `label` (an index into `label_names`, a number, or 0 and 1 for each of them)  |

Beside conversations `tools`, `documents` and `chat_template_kwargs`, beside texts to classify `text_pair`; each only
where some row has it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from adalora_scale.config import DataConfig
from adalora_scale.config.mixing import train_entries
from adalora_scale.data.labels import LabelNames, Place, encoded, find_labels
from adalora_scale.data.layouts import missing_columns, reader_of, user_columns
from adalora_scale.data.mixing import MixedPart, Mixing, limited
from adalora_scale.data.names import is_local
from adalora_scale.data.row_files import first_line
from adalora_scale.data.row_table import Source, gather
from adalora_scale.data.row_values import COLUMNS, Layout, Reader
from adalora_scale.data.sources import (
    open_source,
    refuse_files_read_twice,
    refuse_shared_files,
    say_idle_keys,
)
from adalora_scale.data.streaming import StreamedPart, first_rows
from adalora_scale.errors import UserError
from adalora_scale.process_rank import process_rank

logger = logging.getLogger(__name__)

LossTarget = Literal["all", "completion", "assistant"]

FORMATS = ("messages", "preference", "prompt_completion", "alpaca", "xlam", "glaive", "classification", "text")
"""Values of `data.format`, in the order in which `auto` tries them."""
_LOSS: dict[Layout, tuple[LossTarget, ...]] = {  # the first is the default
    "messages": ("assistant", "all"),
    "prompt_completion": ("completion", "all"),
    "prompt_completion_turns": ("completion", "assistant", "all"),
    "text": ("all",),
}
_OPTIONAL = {"tools", "documents", "chat_template_kwargs", "text_pair"}


@dataclass(frozen=True)
class RawData:
    """Validated rows of one layout, not yet tokenised."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    layout: Layout
    label_names: LabelNames | None
    """Classification: the class of each of the model's outputs, and what a row's label is."""
    mixing: Mixing | None = None
    """How `train`, which holds every row once, is drawn from; None: as it is."""
    streamed: tuple[StreamedPart, ...] = ()
    """Streaming: what training reads; `train` then holds the first rows, which are checked before."""

    def has_calls(self) -> bool:
        """Whether some turn calls a tool."""
        parts = [part for part in (self.train, self.eval) if part is not None and "messages" in part.column_names]
        return any(pc.any(pc.match_substring(_column(part, "messages"), '"tool_calls"')).as_py() for part in parts)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a task trains on; `tasks.registry.wanted_rows` says it, so that this room knows no task."""

    task: str
    """The task's name, for messages."""
    layouts: tuple[Layout, ...]
    """Layouts that it takes."""
    takers: Mapping[Layout, str]
    """For every layout the name of a task that takes it."""


def load_raw(config: DataConfig, wanted: Wanted, *, seed: int) -> RawData:
    """Read, validate and normalise the data of a run.

    Args:
        config: the `data` section.
        wanted: which layouts the task trains on.
        seed: shuffles the rows before `eval_fraction` of them are held out, of each mixed source by itself.

    Raises:
        UserError: a file, row, column or label cannot be used; one line that names it and the fix.
    """
    entries, mixing_key = train_entries(config.train)
    for entry in entries if config.streaming else ():
        if not is_local(entry.path):
            raise UserError(
                f"data.streaming reads local files, and '{entry.path}' is a hub id; download it (hf download "
                "--repo-type dataset) and name its files."
            )
    opened = [_open(entry.path, config, config.train_split) for entry in entries]
    if config.streaming:
        if wanted.layouts == ("classification",):
            raise UserError(
                "data.streaming=true does not go with classification, whose classes are those of all rows; set it to "
                "false."
            )
        whole, opened = opened, [[first_rows(source) for source in sources] for sources in opened]
    train_sources = [source for sources in opened for source in sources]
    eval_names = [config.eval] if isinstance(config.eval, str) else [str(name) for name in config.eval or []]
    eval_sources = _open(eval_names, config, config.eval_split) if config.eval is not None else []
    splits = tuple(key for key in ("train_split", "eval_split") if getattr(config, key) != getattr(DataConfig, key))
    say_idle_keys(train_sources, eval_sources, configuration=config.name is not None, splits=splits)
    refuse_shared_files(train_sources, eval_sources)
    if config.eval_fraction:
        refuse_files_read_twice(train_sources)
    format_ = _recognise(train_sources[0], config, wanted)
    layout, train, rows = _normalise(train_sources, format_, config, wanted)
    held_out: datasets.Dataset | None = None
    if config.eval is not None:
        other, held_out, _ = _normalise(eval_sources, format_, config, wanted)
        if other != layout:
            raise UserError(f"data.train has {layout} rows and data.eval {other} rows; give both the same form.")
    label_names = None
    if layout == "classification":
        # Over all rows, so that max_train_samples of a file sorted by class does not lose classes.
        where = _label_place(train_sources, config)
        label_names, taken = find_labels(train["label"][:], config.labels, where)
        if taken is not None and process_rank() == 0:
            logger.warning("data: %s: %s", train_sources[0].name, taken)
        train = encoded(train, label_names, where)
        held_out = encoded(held_out, label_names, _label_place(eval_sources, config)) if held_out is not None else None
    else:
        loss_target(config, layout)
    mixing = None
    if mixing_key is not None:
        sizes = iter(rows)
        parts = [
            MixedPart(name=entry.path, amount=entry.amount or 1.0, rows=sum(islice(sizes, len(sources))))
            for entry, sources in zip(entries, opened, strict=True)
        ]
        mixing = Mixing(parts=tuple(parts), key=mixing_key, limit=config.max_train_samples)
        train, split, mixing = _split_parts(train, mixing, config, seed)
        held_out = held_out if split is None else split
    elif config.eval_fraction:
        train, held_out = _split(train, config.eval_fraction, seed)
    return RawData(
        train=_first(train, config.max_train_samples) if mixing is None else train,
        eval=_first(held_out, config.max_eval_samples) if held_out is not None else None,
        layout=layout,
        label_names=label_names,
        mixing=mixing,
        streamed=_streamed(whole, format_, config, mixed=mixing is not None) if config.streaming else (),
    )


def _streamed(
    entries: list[list[Source]], format_: str, config: DataConfig, *, mixed: bool
) -> tuple[StreamedPart, ...]:
    groups = entries if mixed else [[source for sources in entries for source in sources]]
    return tuple(
        StreamedPart(
            sources=tuple(sources),
            readers=tuple(reader_of(format_, source.columns, source.first, config) for source in sources),
        )
        for sources in groups
    )


def loss_target(config: DataConfig, layout: Layout) -> LossTarget:
    """Return which tokens of a causal-LM row count in the loss, resolving ``data.loss_on=auto``.

    Raises:
        UserError: `data.loss_on` names something rows of this layout do not have.
    """
    choices = _LOSS[layout]
    if config.loss_on == "auto":
        return choices[0]
    if config.loss_on not in choices:
        raise UserError(f"data.loss_on={config.loss_on} does not fit {layout} rows; use {' or '.join(choices)}.")
    return config.loss_on


def _open(sources: str | list[str], config: DataConfig, split: str) -> list[Source]:
    names = [sources] if isinstance(sources, str) else sources
    if not names:
        raise UserError("data.train and data.eval need at least one file or hub id; the list is empty.")
    return [open_source(name, config.name, split) for name in names]


def _recognise(source: Source, config: DataConfig, wanted: Wanted) -> str:
    if config.format != "auto":
        format_: str = config.format
    elif wanted.layouts == ("classification",):
        format_ = "classification"
    else:
        fitting = [name for name in FORMATS if not missing_columns(name, source.columns, config)]
        if not fitting:
            _refuse_unknown_names(source, config)
            raise UserError(
                f"{source.name}: no known layout in the columns {', '.join(source.columns)}. Name them: "
                "data.messages_column; or data.prompt_column and data.completion_column; or data.text_column (and "
                "data.label_column)."
            )
        format_ = max(fitting, key=lambda name: _is_named(name, config))  # the first of the fitting, or what was named
    return format_


def _refuse_unknown_names(source: Source, config: DataConfig) -> None:
    """Refuse a column that the user has named and the source does not have.

    Raises:
        UserError: naming it and the columns that are there.
    """
    for key in ("messages_column", "prompt_column", "completion_column", "text_column", "label_column"):
        if (name := getattr(config, key)) != getattr(DataConfig, key) and name not in source.columns:
            found = ", ".join(source.columns)
            raise UserError(f"{source.name} has no column '{name}' (it has {found}); set data.{key}.")


def _is_named(format_: str, config: DataConfig) -> bool:
    """Whether the user has named a column that this format reads."""
    keys = {
        "messages": ("messages_column",),
        "prompt_completion": ("prompt_column", "completion_column"),
        "classification": ("label_column", "text_pair_column"),
        "text": ("text_column",),
    }
    return any(getattr(config, key) != getattr(DataConfig, key) for key in keys.get(format_, ()))


def _check_task(source: Source, reader: Reader, format_: str, config: DataConfig, wanted: Wanted) -> None:
    if reader.layout in wanted.layouts:
        return
    if len(wanted.layouts) == 1:
        columns = " and ".join(name for name in COLUMNS[wanted.layouts[0]] if name not in _OPTIONAL)
        raise UserError(f"task={wanted.task} needs {columns} columns, but data.format={config.format}.")
    alone = ", or data.format=text to train on the text alone" if config.text_column in source.columns else ""
    columns = ", ".join(user_columns(format_, source.columns, config))
    raise UserError(
        f"{source.name} is {reader.layout} data (columns {columns}): set task={wanted.takers[reader.layout]}{alone}."
    )


def _normalise(
    sources: list[Source], format_: str, config: DataConfig, wanted: Wanted
) -> tuple[Layout, datasets.Dataset, list[int]]:
    """Return the sources' layout, their rows one behind the other, and how many each has."""
    layout: Layout | None = None
    parts = []
    for source in sources:
        for key in missing_columns(format_, source.columns, config):
            name, found = getattr(config, f"{key}_column", key), ", ".join(source.columns)
            way_out = (
                f"set data.{key}_column" if hasattr(config, f"{key}_column") else "set data.format to another form"
            )
            raise UserError(f"{source.name} has no column '{name}' (it has {found}); {way_out}.")
        reader = reader_of(format_, source.columns, source.first, config)
        _check_task(source, reader, format_, config, wanted)
        if reader.layout != (layout := layout or reader.layout):
            raise UserError(
                f"{source.name} has {reader.layout} rows and {sources[0].name} {layout} rows; use one form."
            )
        part, notes = gather(source, reader, _options(format_, config))
        if notes and process_rank() == 0:
            logger.warning("data: %s: not used: %s", source.name, "; ".join(notes))
        parts.append(part)
    joined = datasets.concatenate_datasets(parts)
    empty = [
        name for name in joined.column_names if name in _OPTIONAL and _column(joined, name).null_count == len(joined)
    ]
    return layout or "text", joined.remove_columns(empty), [len(part) for part in parts]


def _options(format_: str, config: DataConfig) -> list[Any]:
    """Return what decides how a row is read, beside the row."""
    columns = {key: value for key, value in asdict(config).items() if key.endswith("_column")}
    return [format_, columns, config.chat_template is not None]


def _column(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return dataset.with_format("arrow")[:][name]


def _label_place(sources: list[Source], config: DataConfig) -> Place:
    """Return what says where a row's label stands."""

    def where(row: int) -> str:
        name, _ = next(islice((place for source in sources for place in source.rows(None)), row, None))
        return f"{name}: column '{config.label_column}'"

    return where


def _split_parts(
    dataset: datasets.Dataset, mixing: Mixing, config: DataConfig, seed: int
) -> tuple[datasets.Dataset, datasets.Dataset | None, Mixing]:
    """Hold rows out of each part, before any is drawn twice, and keep each part's share of the limits."""
    parts, starts = mixing.parts, mixing.starts()
    train = [dataset.select(range(start, start + part.rows)) for start, part in zip(starts, parts, strict=False)]
    held_out = None
    if config.eval_fraction:
        split = [
            _split(rows, config.eval_fraction, seed, f" of '{part.name}'")
            for rows, part in zip(train, parts, strict=True)
        ]
        train, others = [rows for rows, _ in split], [rows for _, rows in split]
        sizes = [len(rows) for rows in others]
        kept = limited(sizes, sizes, config.max_eval_samples)
        held_out = datasets.concatenate_datasets([_first(r, size) for r, size in zip(others, kept, strict=True)])
    kept = limited([part.amount for part in parts], [len(rows) for rows in train], config.max_train_samples)
    train = [_first(rows, size) for rows, size in zip(train, kept, strict=True)]
    return datasets.concatenate_datasets(train), held_out, mixing.with_rows(kept)


def _split(
    dataset: datasets.Dataset, fraction: float, seed: int, of: str = ""
) -> tuple[datasets.Dataset, datasets.Dataset]:
    try:
        parts = dataset.train_test_split(test_size=fraction, seed=seed)
    except ValueError as error:
        raise UserError(
            f"data.eval_fraction={fraction} of {dataset.num_rows} rows{of} leaves nothing: {first_line(error)}"
        ) from None
    return parts["train"], parts["test"]


def _first(dataset: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    return dataset if limit is None or limit >= dataset.num_rows else dataset.select(range(limit))
