"""Reading one file of rows with the datasets library, and finding the line of a row that cannot be used.

The builders of `datasets` are fast but name neither file nor line when a row is bad, and pandas shifts or drops the
fields of a malformed CSV line without a word. So a file is read by its builder, checked column-wise, and walked row by
row in Python only to find the line to name; CSV files are always walked, because their damage is silent.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.json.json import JsonConfig

from adalora_scale.errors import UserError

BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
"""Extension of a data file -> builder of the datasets library."""


def is_local(source: str) -> bool:
    """Tell a path from a hub id: a known extension, an existing path, or a form no hub id can have."""
    path = Path(source).expanduser()
    looks_like_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    return path.suffix.lower() in BUILDERS or looks_like_path or path.exists()


def read_file(source: str) -> datasets.Dataset:
    """Read a JSONL, JSON, CSV or Parquet file; every CSV field is read as text.

    Args:
        source: path of the file.

    Raises:
        UserError: the file is missing, empty, of an unknown kind, or holds a row that cannot be read.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"data file {source} does not exist (looked in {Path.cwd()}).")
    if path.is_dir():
        raise UserError(f"{source} is a directory; name its files instead, as a list.")
    builder = BUILDERS.get(path.suffix.lower())
    if builder is None:
        raise UserError(f"{source} has an unknown extension '{path.suffix}'; supported: {', '.join(BUILDERS)}.")
    if path.stat().st_size == 0:
        raise UserError(f"data file {source} is empty.")
    if builder == "csv" and not _walk(source):
        raise UserError(f"data file {source} has a header but no rows.")
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


def iterate_rows(source: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (``file:line``, row) in file order; Parquet files and JSON arrays count rows in place of lines.

    Raises:
        UserError: a row cannot be read; names file and line.
    """
    path = Path(source).expanduser()
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
    with path.open(encoding="utf-8-sig", newline="") as file:
        names = next((fields for fields in csv.reader(file) if fields), [])
    # pandas' own name for a column without one, which its `to_csv` writes for the row index.
    return [name or f"Unnamed: {i}" for i, name in enumerate(names)]


def _csv_rows(source: str, path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    limit = csv.field_size_limit(sys.maxsize)  # a document may be longer than the default 128 KiB field
    line = 1
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            header = next((fields for fields in reader if fields), [])
            if len(set(header)) < len(header):
                raise UserError(f"{source}:{reader.line_num}: two columns have the same name ({', '.join(header)}).")
            line = reader.line_num + 1
            for fields in reader:
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
        with path.open(encoding="utf-8-sig") as file:
            start = file.read(1)
            while start.isspace():
                start = file.read(1)
            file.seek(0)
            if start == "[":
                yield from _json_array(source, file.read())
                return
            for line, text in enumerate(file, start=1):
                if not text.strip():
                    continue
                try:
                    row = json.loads(text)
                except json.JSONDecodeError as error:
                    raise UserError(f"{source}:{line}: broken JSON: {error.msg} (column {error.colno}).") from None
                yield _mapping(f"{source}:{line}", row)
    except UnicodeDecodeError:
        raise UserError(f"{source}:{_undecodable_line(path)}: not UTF-8 text; convert the file to UTF-8.") from None


def _json_array(source: str, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{source}:{error.lineno}: broken JSON: {error.msg} (column {error.colno}).") from None
    for index, row in enumerate(rows, start=1):
        yield _mapping(f"{source} row {index}", row)


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
