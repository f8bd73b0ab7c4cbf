"""Reading one file of rows with the datasets library, and finding the line of a row that cannot be used.

The builders of `datasets` are fast but name neither file nor line when a row is bad, and pandas shifts or drops the
fields of a malformed CSV line without a word. So a file is read by its builder, checked column-wise, and walked row by
row in Python only to find the line to name; CSV files are always walked, because their damage is silent.
"""

from __future__ import annotations

import codecs
import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.json.json import JsonConfig

from adalora_scale.data.row_limits import (
    MAX_COLUMNS,
    MAX_ROW_BYTES,
    bounded_lines,
    check_shape,
    parse_row,
    refuse_hostile,
    refuse_special,
)
from adalora_scale.data.token_cache import build_once, default_cache_dir
from adalora_scale.errors import UserError

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Extension of a data file -> builder of the datasets library."""
_LARGE = 2**20
"""Bytes of a file that is worth remembering as looked at; some 25 ms."""


def is_local(source: str) -> bool:
    """Tell a path from a hub id: a known extension, an existing path, or a form no hub id can have."""
    path = _path(source)
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    return path.suffix.lower() in BUILDERS or looks_like_path or os.path.lexists(path)


def read_file(source: str) -> datasets.Dataset:
    """Read a JSONL, JSON, CSV or Parquet file; every CSV field is read as text.

    Args:
        source: path of the file.

    Raises:
        UserError: the file is missing, empty, of an unknown kind, or holds a row that cannot be read.
    """
    path = _path(source)
    size = refuse_special(source, path)
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise UserError(f"{source} has an unknown extension '{path.suffix}'; supported: {', '.join(BUILDERS)}.")
    if size == 0:
        raise UserError(f"data file {source} is empty.")
    _look_once(source, path, builder)
    if builder == "csv" and not _walk(source):
        raise UserError(f"data file {source} has a header but no rows.")
    if builder == "json" and _is_array(path) and not _walk(source):  # its builder keeps the last of two equal keys
        raise UserError(f"data file {source} has no rows.")
    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the builders log what is raised below in one line
    try:
        return _build(builder, path)
    except Exception as error:  # datasets wraps parser errors in several of its own types
        if builder != "parquet" and not _walk(source):  # which names the broken line if there is one
            raise UserError(f"data file {source} has no rows.") from None
        cause = error.__cause__ or error
        raise UserError(f"cannot read {source}: {type(cause).__name__}: {first_line(cause)}") from None
    finally:
        datasets.logging.set_verbosity(verbosity)


def _look_once(source: str, path: Path, builder: str) -> None:
    """Pass over a large file once for all processes and starts, until it changes."""
    status = path.stat()
    if status.st_size < _LARGE:
        refuse_hostile(source, path, builder)
        return
    what = (str(path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino, version("adalora-scale"))
    key = hashlib.sha256(repr(what).encode()).hexdigest()
    build_once(default_cache_dir() / "looked_at", key, lambda folder: refuse_hostile(source, path, builder))


def iterate_rows(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (``file:line``, row) in file order; Parquet files and JSON arrays count rows in place of lines.

    Raises:
        UserError: a row cannot be read; names file and line.
    """
    path = _path(source)
    match BUILDERS[path.suffix.lower()]:
        case "csv":
            yield from _csv_rows(source, path)
        case "json":
            yield from _json_rows(source, path)
        case _:
            for index, row in enumerate(_build("parquet", path), start=1):
                yield f"{source} row {index}", row


def first_line(error: BaseException) -> str:
    """Return the first line of an exception's message."""
    return (str(error).strip().splitlines() or ["no message"])[0]


def _path(source: str) -> Path:
    try:
        return Path(source).expanduser()
    except RuntimeError:
        raise UserError(f"{source}: there is no such user; write the whole path.") from None


def _is_array(path: Path) -> bool:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.read(4096).lstrip()[:1] == "["


def _walk(source: str) -> int:
    """Count the rows, stopping at the first that cannot be read."""
    return sum(1 for _ in iterate_rows(source))


def _build(builder: str, path: Path) -> datasets.Dataset:
    options: dict[str, Any] = {}
    if builder == "csv":
        # A column of digits or "NA" is still text: types are decided by the layout, not guessed by pandas.
        features = datasets.Features({name: datasets.Value("string") for name in _csv_header(path)})
        options = {"features": features, "na_filter": False}
    if builder == "json" and "parse_agent_traces" in JsonConfig.__dataclass_fields__:
        # datasets 5 replaces the columns of files that look like traces of coding agents; rows must stay as they are.
        options = {"parse_agent_traces": False}
    # The builder treats its argument as a glob pattern; a file name may contain the brackets of one.
    pattern = "".join(f"[{c}]" if c in "*?[" else c for c in str(path.absolute()))
    return datasets.load_dataset(builder, data_files={"train": [pattern]}, split="train", **options)


def _csv_header(path: Path) -> list[str]:
    with path.open(encoding="utf-8-sig", newline="") as file:  # whose rows are known to have bounded lines
        names = next((fields for fields in csv.reader(file) if fields), [])
    # pandas' own name for a column without one, which its `to_csv` writes for the row index.
    return [name or f"Unnamed: {i}" for i, name in enumerate(names)]


def _csv_rows(source: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    limit = csv.field_size_limit(MAX_ROW_BYTES)  # a document may be longer than the default 128 KiB field
    line, size = 1, [0]
    try:
        with path.open("rb") as file:
            reader = csv.reader(_text_lines(bounded_lines(source, file, size)))
            header = next((fields for fields in reader if fields), [])
            if len(set(header)) < len(header):
                raise UserError(f"{source}:{reader.line_num}: two columns have the same name ({', '.join(header)}).")
            if len(header) > MAX_COLUMNS:
                raise UserError(f"{source}:1: has {len(header):,} columns; a table may have {MAX_COLUMNS:,}.")
            line, size[0] = reader.line_num + 1, 0
            for fields in reader:
                size[0] = 0
                if fields and len(fields) != len(header):
                    hint = "quote fields that contain a comma, a quote or a line break"
                    raise UserError(
                        f"{source}:{line}: the row has {len(fields)} fields, the header has {len(header)}; {hint}."
                    )
                if fields:
                    yield f"{source}:{line}", dict(zip(header, fields, strict=True))
                line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{source}:{line}: not a CSV row: {error}.") from None
    except UnicodeDecodeError:
        raise UserError(f"{source}:{_undecodable_line(path)}: not UTF-8 text; convert the file to UTF-8.") from None
    finally:
        csv.field_size_limit(limit)


def _json_rows(source: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        if _is_array(path):
            yield from _json_array(source, path.read_text(encoding="utf-8-sig"))
            return
        with path.open("rb") as file:
            size = [0]
            for line, text in enumerate(codecs.iterdecode(bounded_lines(source, file, size), "utf-8-sig"), start=1):
                size[0] = 0
                if not text.strip():
                    continue
                try:
                    row = parse_row(f"{source}:{line}", text)
                except json.JSONDecodeError as error:
                    raise UserError(f"{source}:{line}: broken JSON: {error.msg} (column {error.colno}).") from None
                yield _mapping(f"{source}:{line}", row)
    except UnicodeDecodeError:
        raise UserError(f"{source}:{_undecodable_line(path)}: not UTF-8 text; convert the file to UTF-8.") from None


def _json_array(source: str, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        rows = parse_row(source, text)
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


def _undecodable_line(path: Path) -> int:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            try:
                raw.decode("utf-8")
            except UnicodeDecodeError:
                return number
    return 1
