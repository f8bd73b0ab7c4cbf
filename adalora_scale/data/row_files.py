"""One file of rows: what stands in it, row by row, and where each row is.

Values are taken as they stand. The builders of `datasets` guess one type for a column (a date, a number, a list of
equal objects) and change or refuse what does not fit it, name neither file nor line, and pandas shifts or drops the
fields of a malformed CSV line without a word; so files are read here, by parsers that guess nothing.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from adalora_scale.data.arrow_rows import class_names, plain_rows
from adalora_scale.data.names import inner_name, is_packed, kind_of, local_path, look, refuse_special
from adalora_scale.data.packed import opened, read_whole
from adalora_scale.data.row_limits import (
    MAX_ARRAY_BYTES,
    MAX_COLUMNS,
    MAX_ROW_BYTES,
    bounded_lines,
    check_shape,
    parse_row,
    refuse_hostile,
)
from adalora_scale.data.token_cache import build_once, default_cache_dir
from adalora_scale.errors import UserError

LARGE = 2**20
"""Bytes of a file that is worth remembering as looked at; some 25 ms."""
_SAMPLE = 1000
"""Rows of a JSON file whose keys are its columns."""
_PARQUET_ROWS = 256


def check_file(source: str) -> Path:
    """Return the path of a file of rows that may be read.

    Args:
        source: path of the file.

    Raises:
        UserError: the file is missing, empty, of an unknown kind, or would harm whoever opens it.
    """
    path = local_path(source)
    refuse_special(source, path)  # a name that can be no hub id's is a file's here, whatever its ending
    look(source)
    _look_once(source, path, kind_of(path) or "")
    return path


def file_identity(path: Path) -> list[Any] | None:
    """Return what tells a file's content from any earlier one; None for a file that is read faster than remembered.

    A packed file is always remembered: what is in it may be a thousand times its size.
    """
    return file_stamp(path) if path.stat().st_size >= LARGE or is_packed(path) else None


def file_stamp(path: Path) -> list[Any]:
    """Return what tells a file's content from any earlier one, whatever its size."""
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino, version("adalora-scale")]


def sample_of(source: str) -> tuple[list[str], Mapping[str, Any]]:
    """Return the names of a file's columns (a JSON file's are the keys of its first thousand rows) and its first row.

    Raises:
        UserError: there is no row, or one of these cannot be read.
    """
    count = _SAMPLE if kind_of(local_path(source)) == "json" else 1
    sample = [row for _, row in islice(iterate_rows(source), count)]
    if not sample:
        raise UserError(f"data file {source} has no rows.")
    return list(dict.fromkeys(key for row in sample for key in row)), sample[0]


def _look_once(source: str, path: Path, kind: str) -> None:
    """Pass over a large file once for all processes and starts, until it changes."""
    what = file_identity(path)
    if what is None:
        refuse_hostile(source, path, kind)
        return
    key = hashlib.sha256(repr(what).encode()).hexdigest()
    build_once(default_cache_dir() / "looked_at", key, lambda folder: refuse_hostile(source, path, kind))


def iterate_rows(source: str, columns: Collection[str] | None = None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (``file:line``, row) in file order; Parquet files and JSON arrays count rows in place of lines.

    Args:
        source: path of the file.
        columns: those that are needed; a Parquet file is not read for others.

    Raises:
        UserError: a row cannot be read; names file and line.
    """
    path = local_path(source)
    match kind_of(path):
        case "csv":
            yield from _csv_rows(source, path)
        case "json":
            yield from _json_rows(source, path)
        case _:
            yield from _parquet_rows(source, path, columns)


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def _is_array(source: str, path: Path) -> bool:
    with opened(source, path) as file:
        return file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"["


def _parquet_rows(source: str, path: Path, columns: Collection[str] | None) -> Iterator[tuple[str, Mapping[str, Any]]]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            wanted = None if columns is None else [name for name in file.schema_arrow.names if name in columns]
            names = class_names(file.schema_arrow)
            for batch in file.iter_batches(_PARQUET_ROWS, columns=wanted):
                for row in plain_rows(batch, names):
                    number += 1
                    yield f"{source} row {number}", row
    except UnicodeDecodeError:
        raise UserError(f"{source}: not UTF-8 text after row {number}; convert the file's text to UTF-8.") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot read {source} after row {number}: {first_line(error)}") from None


def _csv_rows(source: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    limit = csv.field_size_limit(MAX_ROW_BYTES)  # a document may be longer than the default 128 KiB field
    line, size = 1, [0]
    between, name = ("\t", "tab") if inner_name(path).suffix.lower() == ".tsv" else (",", "comma")
    try:
        with opened(source, path) as file:
            reader = csv.reader(_text_lines(bounded_lines(source, file, size)), delimiter=between, strict=True)
            header = next((fields for fields in reader if fields), [])
            # pandas' own name for a column without one, which its `to_csv` writes for the row index.
            header = [name or f"Unnamed: {i}" for i, name in enumerate(header)]
            if len(set(header)) < len(header):
                raise UserError(f"{source}:{reader.line_num}: two columns have the same name ({', '.join(header)}).")
            if len(header) > MAX_COLUMNS:
                raise UserError(f"{source}:1: has {len(header):,} columns; a table may have {MAX_COLUMNS:,}.")
            line, size[0] = reader.line_num + 1, 0
            for fields in reader:
                size[0] = 0
                if fields and len(fields) != len(header):
                    hint = f"quote fields that contain a {name}, a quote or a line break"
                    raise UserError(
                        f"{source}:{line}: the row has {len(fields)} fields, the header has {len(header)}; {hint}."
                    )
                if fields:
                    yield f"{source}:{line}", dict(zip(header, fields, strict=True))
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{source}:{line}: not a row of a table: {error}; a field that begins with a quote ends with one, and "
            'quotes inside it are written twice ("").'
        ) from None
    except UnicodeDecodeError:
        raise UserError(
            f"{source}:{_undecodable_line(source, path)}: not UTF-8 text; convert the file to UTF-8."
        ) from None
    finally:
        csv.field_size_limit(limit)


def _json_rows(source: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        if _is_array(source, path):
            yield from _json_array(source, path)
            return
        with opened(source, path) as file:
            size = [0]
            for line, text in enumerate(codecs.iterdecode(bounded_lines(source, file, size), "utf-8-sig"), start=1):
                size[0] = 0
                if not text.strip():
                    continue
                try:
                    row = parse_row(f"{source}:{line}", text)
                except json.JSONDecodeError as error:
                    spread = _spread_rows(source, path, line)
                    if spread is None:
                        raise UserError(f"{source}:{line}: broken JSON: {error.msg} (column {error.colno}).") from None
                    yield from spread
                    return
                yield _mapping(f"{source}:{line}", row)
    except UnicodeDecodeError:
        raise UserError(
            f"{source}:{_undecodable_line(source, path)}: not UTF-8 text; convert the file to UTF-8."
        ) from None


def _spread_rows(source: str, path: Path, line: int) -> list[tuple[str, Mapping[str, Any]]] | None:
    """Return the rows from a line on where objects span lines or share them; None if that is not what is wrong."""
    content = read_whole(source, path, MAX_ARRAY_BYTES)
    if content is None:
        return None
    text = "".join(islice(io.StringIO(content.decode("utf-8-sig"), newline="\n"), line - 1, None))
    decoder, rows, at = json.JSONDecoder(), [], 0
    while at < len(text := text.rstrip()):
        at += len(text[at:]) - len(text[at:].lstrip())
        try:
            _, end = decoder.raw_decode(text, at)
        except (json.JSONDecodeError, ValueError, RecursionError):
            return None
        where = f"{source}:{line + text.count(chr(10), 0, at)}"
        rows.append(_mapping(where, parse_row(where, text[at:end])))
        at = end
    return rows


def _json_array(source: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    content = read_whole(source, path, MAX_ARRAY_BYTES)
    if content is None:
        raise UserError(
            f"{source} is one JSON array of more than {MAX_ARRAY_BYTES:,} bytes, which can be read only whole; "
            "write a row a line (JSONL), for example with `jq -c '.[]'`."
        )
    try:
        rows = parse_row(source, content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{source}:{error.lineno}: broken JSON: {error.msg} (column {error.colno}).") from None
    for index, row in enumerate(rows, start=1):
        check_shape(f"{source} row {index}", row)
        # The builder of datasets gives a list of texts the column `text`.
        yield _mapping(f"{source} row {index}", {"text": row} if isinstance(row, str) else row)


def _text_lines(lines: Iterator[bytes]) -> Iterator[str]:
    """Decode lines, those ended by a lone carriage return apart."""
    for text in codecs.iterdecode(lines, "utf-8-sig"):
        yield from re.split(r"(?<=\r)(?!\n)", text) if "\r" in text[:-2] else (text,)


def _mapping(where: str, row: Any) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row must be a JSON object with named columns, not {type(row).__name__}.")
    return where, row


def _undecodable_line(source: str, path: Path) -> int:
    with opened(source, path) as file:
        for number, raw in enumerate(file, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1
