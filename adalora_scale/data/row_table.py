"""Rows of a source gathered into one table of a layout, once for all processes of a job where that takes time."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pyarrow as pa
from datasets.features.features import register_feature

from adalora_scale.data.digests import digest
from adalora_scale.data.row_values import COLUMNS, BadColumn, Reader
from adalora_scale.data.token_cache import build_once, default_cache_dir
from adalora_scale.errors import UserError

_AT_ONCE = 1000
_BYTES_AT_ONCE = 2**26


@dataclass
class JsonText:
    """A column's type for `datasets`: JSON of any shape, stored as the text it was read from.

    (That library's own type, `datasets.Json`, reads with a parser that rounds numbers: 0.3 to 0.30000000000000004.)
    """

    decode: bool = True
    pa_type: ClassVar[pa.DataType] = pa.large_string()
    _type: str = field(default="JsonText", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        """Return the Arrow type."""
        return self.pa_type

    def encode_example(self, value: Any) -> str | None:
        """Return a value's JSON text; what is text is taken for it."""
        return value if value is None or isinstance(value, str) else json.dumps(value, ensure_ascii=False)

    def decode_example(self, value: str | None, token_per_repo_id: Any = None) -> Any:
        """Return the value of a JSON text."""
        return None if value is None else json.loads(value)

    def cast_storage(self, storage: pa.Array) -> pa.Array:
        """Return a column that is stored so already."""
        return storage


with warnings.catch_warnings():
    warnings.simplefilter("ignore", UserWarning)  # "experimental"; without it a table's own metadata cannot be read
    register_feature(JsonText, "JsonText")


@dataclass(frozen=True)
class Source:
    """What one name stands for: its columns, and a walk over its rows that can say where each one is."""

    name: str
    columns: list[str]
    first: Mapping[str, Any]
    """The first row."""
    rows: Callable[[Collection[str] | None], Iterator[tuple[str, Mapping[str, Any]]]]
    """Given the columns that are needed (None: all), yields (where, row)."""
    identity: list[Any] | None
    """JSON that tells its content from any other; None for a small source, which is gathered in memory."""
    keys: frozenset[str] = frozenset()
    """Which of `name` and `split` it was chosen by."""
    files: tuple[Path, ...] = ()
    """The local files behind it, links followed."""


def gather(source: Source, reader: Reader, options: Any) -> tuple[datasets.Dataset, list[str]]:
    """Return a source's rows in the columns of the reader's layout, and what of it is not used, in words.

    Args:
        source: the rows.
        reader: reads one row.
        options: JSON; what else decides how a row is read.

    Raises:
        UserError: a row cannot be used; names it and the column.
    """
    if source.identity is None:
        notes: list[str] = []
        table = pa.Table.from_batches(_batches(source, reader, notes), _schema(reader))
        return datasets.Dataset(table, datasets.DatasetInfo(features=features_of(reader))), notes

    def build(directory: Path) -> None:
        notes: list[str] = []
        schema = _schema(reader)
        with pa.OSFile(str(directory / "rows.arrow"), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
            for batch in _batches(source, reader, notes):
                writer.write_batch(batch)
        (directory / "notes.json").write_text(json.dumps(notes), encoding="utf-8")

    key = digest(["rows", 2, source.identity, reader.layout, sorted(reader.used), options])
    directory = build_once(default_cache_dir() / "rows", key, build)
    known = json.loads((directory / "notes.json").read_text(encoding="utf-8"))
    info = datasets.DatasetInfo(features=features_of(reader))
    return datasets.Dataset.from_file(str(directory / "rows.arrow"), info=info), known


def features_of(reader: Reader) -> datasets.Features:
    """Return the types of the columns of a reader's layout."""
    types = {"string": datasets.Value("large_string"), "int64": datasets.Value("int64"), "json": JsonText()}
    return datasets.Features({name: types[kind] for name, kind in COLUMNS[reader.layout].items()})


def _schema(reader: Reader) -> pa.Schema:
    return features_of(reader).arrow_schema.remove_metadata()


def _batches(source: Source, reader: Reader, notes: list[str]) -> Iterator[pa.RecordBatch]:
    """Yield batches; `notes` is complete after the last."""
    seen, unused, schema = dict.fromkeys(source.columns), set(reader.notes), _schema(reader)
    waiting: list[dict[str, Any]] = []
    size = 0
    for where, row in source.rows(reader.used):
        seen.update(dict.fromkeys(row))
        try:
            read = reader.read(row, unused)
        except BadColumn as problem:
            raise UserError(f"{where}: {problem}.") from None
        waiting.append(read)
        size += sum(len(value) for value in read.values() if isinstance(value, str))
        if len(waiting) >= _AT_ONCE or size > _BYTES_AT_ONCE:
            yield pa.RecordBatch.from_pylist(waiting, schema)
            waiting, size = [], 0
    if waiting:
        yield pa.RecordBatch.from_pylist(waiting, schema)
    columns = [name for name in seen if name not in reader.used]
    if columns:
        rest = len(columns) - 20
        shown = ", ".join(islice(columns, 20)) + (f" and {rest} more" if rest > 0 else "")
        notes.append(f"columns {shown}")
    notes.extend(sorted(unused))
