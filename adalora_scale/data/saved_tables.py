"""Rows of data sets that the datasets library holds as Arrow tables: the hub's, and folders of its `save_to_disk`."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

from adalora_scale.data.arrow_rows import class_names, plain_rows
from adalora_scale.data.names import ENDINGS, refuse_special
from adalora_scale.data.row_files import LARGE, file_stamp, first_line
from adalora_scale.data.row_limits import MAX_COLUMNS
from adalora_scale.data.row_table import Source
from adalora_scale.errors import UserError
from adalora_scale.reading.json_text import read_object

_AT_ONCE = 256
_STATE, _INFO, _DICT = "state.json", "dataset_info.json", "dataset_dict.json"


def hub_source(name: str, configuration: str | None, split: str) -> Source:
    """Return the rows of a split of a hub data set.

    Raises:
        UserError: it cannot be loaded, or has no rows.
    """
    try:
        dataset = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # network, missing repository, missing configuration, missing split, script refusal …
        raise UserError(
            f"cannot load the hub data set '{name}' (data.name={configuration}, split {split}): "
            f"{type(error).__name__}: {first_line(error)} A local file must exist and end in {ENDINGS}."
        ) from None
    where = f"{name}[{split}]"
    return _source(where, dataset, ["hub", where, dataset._fingerprint], frozenset(["name", "split"]))


def is_saved(path: Path) -> bool:
    """Whether `save_to_disk` wrote a folder: a `Dataset`, or a `DatasetDict` with a folder a split."""
    return (path / _DICT).is_file() or all((path / name).is_file() for name in (_STATE, _INFO))


def saved_source(name: str, path: Path, split: str) -> Source:
    """Return the rows of a folder that `save_to_disk` wrote.

    Args:
        name: the folder as the user wrote it.
        path: the folder.
        split: which of a `DatasetDict`; a `Dataset` has none.

    Raises:
        UserError: there is no such split, or the folder's files cannot be read.
    """
    where, keys = name, frozenset[str]()
    if (path / _DICT).is_file():
        splits = read_object(path / _DICT).get("splits")
        known = [each for each in splits if isinstance(each, str)] if isinstance(splits, list) else []
        if split not in known or Path(split).name != split:
            raise UserError(
                f"{name} holds the splits {', '.join(known)}, not '{split}'; set data.train_split and data.eval_split."
            )
        where, path, keys = f"{name}[{split}]", path / split, frozenset(["split"])
    parts = _parts(where, path)
    size = sum(refuse_special(str(part), part) for part in parts)
    try:
        # Another format than Arrow was only the writer's view of it.
        dataset = datasets.load_from_disk(str(path)).with_format("arrow")
    except Exception as error:  # broken JSON, other Arrow types than the columns', a format whose package is missing …
        raise UserError(
            f"cannot read {where}, a folder of save_to_disk: {type(error).__name__}: {first_line(error)}"
        ) from None
    if dataset.num_rows > size:
        raise UserError(f"{where} claims {dataset.num_rows:,} rows in fewer bytes; no rows of text are so short.")
    stamps = [file_stamp(part) for part in (path / _STATE, path / _INFO, *parts)]
    return _source(where, dataset, None if size < LARGE else stamps, keys, tuple(part.resolve() for part in parts))


def _parts(where: str, path: Path) -> list[Path]:
    """Return the files of a saved table: those that its state names, inside its folder."""
    entries = read_object(path / _STATE).get("_data_files")
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or [None]]
    for name in names:
        if not isinstance(name, str) or os.path.basename(name) != name or not name.endswith(".arrow"):
            raise UserError(f"{where}: {_STATE} names no Arrow files inside the folder; save the data set again.")
    return [path / str(name) for name in names]


def _source(
    where: str,
    dataset: datasets.Dataset,
    identity: list[Any] | None,
    keys: frozenset[str],
    files: tuple[Path, ...] = (),
) -> Source:
    if dataset.num_rows == 0:
        raise UserError(f"{where} has no rows.")
    if len(dataset.column_names) > MAX_COLUMNS:
        raise UserError(f"{where} has {len(dataset.column_names):,} columns; a table may have {MAX_COLUMNS:,}.")

    def rows(wanted: Collection[str] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
        columns = [column for column in dataset.column_names if wanted is None or column in wanted]
        classes = class_names(dataset.features.arrow_schema)
        number = 0
        for batch in dataset.select_columns(columns).with_format("arrow").iter(batch_size=_AT_ONCE):
            try:
                batch.validate(full=True)  # offsets of a damaged file lead anywhere
                plain = list(plain_rows(batch, classes))
            except (pa.ArrowException, UnicodeDecodeError) as error:
                raise UserError(f"cannot read {where} after row {number}: {first_line(error)}") from None
            for row in plain:
                number += 1
                yield f"{where} row {number}", row

    _, first = next(rows(None))
    return Source(where, dataset.column_names, first, rows, identity, keys=keys, files=files)
