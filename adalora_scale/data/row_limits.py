"""What a file of rows may hold, looked at before the datasets library opens it.

The builders of `datasets` unpack whatever looks like an archive, end the process on deep nesting, read a line of any
length whole and take minutes over thousands of columns. So the bytes are passed once, and
only lines with many brackets or keys are parsed for it.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from adalora_scale.data.packed import opened, read_whole
from adalora_scale.errors import UserError
from adalora_scale.messages import quoted
from adalora_scale.reading.text import MAX_DEPTH, nests_deeper, unique_keys

MAX_ROW_BYTES = 2**24
"""Of one row: some four million tokens, which tokenising takes about a gigabyte for."""
MAX_ARRAY_BYTES = 2**28
"""Of a file that is one JSON array, which can be read only whole; JSONL files have no limit."""
MAX_COLUMNS = 1000
"""Keys of a row, those inside turns counted, or columns of a table; the layouts need two."""

_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"{}[]"))
_SPLIT = "split it into several rows"


def refuse_hostile(source: str, path: Path, kind: str) -> None:
    """Pass over a data file's bytes once.

    Args:
        source: the file's name as the user wrote it.
        path: the file.
        kind: `json` or `parquet`; tables of text are walked row by row anyway.

    Raises:
        UserError: it is packed or binary, a row is too long, nests too deeply or has too many keys; names the line.
    """
    if kind == "parquet":
        _check_parquet(source, path)
    elif kind == "json":
        _check_json(source, path)


def bounded_lines(source: str, file: BinaryIO, fresh: list[int]) -> Iterator[bytes]:
    """Yield lines of a binary file opened for reading, none longer than `MAX_ROW_BYTES` and without NUL bytes.

    Args:
        source: the file's name.
        file: open for reading.
        fresh: one number, the bytes of the row so far; a reader whose rows span lines sets it to 0 after each row.

    Raises:
        UserError: names the file and line.
    """
    number = 0
    while line := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        fresh[0] += len(line)
        if fresh[0] > MAX_ROW_BYTES:
            raise UserError(f"{source}:{number}: the row is longer than {MAX_ROW_BYTES:,} bytes; {_SPLIT}.")
        if b"\0" in line:
            raise UserError(f"{source}:{number}: holds NUL bytes, so this is no text file; unpack or convert it.")
        yield line


def parse_row(where: str, text: str | bytes) -> Any:
    """Return one JSON value, with every key once.

    Raises:
        json.JSONDecodeError: it is not JSON.
        UserError: a key stands there twice, it nests too deeply, holds a number or text that cannot be read.
    """
    try:
        row = json.loads(text, object_pairs_hook=unique_keys, parse_float=_finite)
        if b"\\u" in text if isinstance(text, bytes) else "\\u" in text:
            json.dumps(row, ensure_ascii=False).encode()
    except (json.JSONDecodeError, UserError):
        raise
    except UnicodeEncodeError:
        raise UserError(f"{where}: a \\u escape stands for half a character (a lone surrogate); correct it.") from None
    except UnicodeDecodeError:
        raise UserError(f"{where}: not UTF-8 text; convert the file to UTF-8.") from None
    except RecursionError:
        raise UserError(f"{where}: nests too deeply.") from None
    except ValueError as error:  # a key stated twice, a number of more than 4,300 digits
        raise UserError(f"{where}: {str(error).split(';')[0]}.") from None
    check_shape(where, row)
    return row


def _finite(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {quoted(text)} is too large")
    return value


def check_shape(where: str, row: Any) -> None:
    """Refuse a row whose shape no layout has.

    Raises:
        UserError: it nests deeper than `MAX_DEPTH`, or would make more than `MAX_COLUMNS` columns.
    """
    if nests_deeper(row, MAX_DEPTH):
        raise UserError(f"{where}: nests deeper than {MAX_DEPTH} levels.")
    columns: set[tuple[str, ...]] = set()
    waiting: list[tuple[tuple[str, ...], Any]] = [((), row)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [((*path, key), inner) for key, inner in value.items()]
            columns |= {(*path, key) for key in value}
        elif isinstance(value, list):
            waiting += [(path, inner) for inner in value if isinstance(inner, dict | list)]
        if len(columns) > MAX_COLUMNS:
            raise UserError(f"{where}: has more than {MAX_COLUMNS:,} keys of different names.")


def _check_json(source: str, path: Path) -> None:
    with opened(source, path) as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start and start[:1] not in (b"{", b"["):
        raise UserError(
            f"{source}:1: not JSON: rows are objects, {{…}}; unpack or convert the file (a packed one is opened where "
            f"its name says so, .jsonl.gz or .jsonl.zst, a pickled one never)."
        )
    if start[:1] == b"[":
        return  # its rows are walked
    with opened(source, path) as file:
        size, spread = [0], 0
        for number, line in enumerate(bounded_lines(source, file, size), start=1):
            size[0] = 0
            text = line.removeprefix(b"\xef\xbb\xbf").strip()
            if not spread and text and not (text.startswith(b"{") and text.endswith(b"}")):
                spread = number
            if text.count(b"{") + text.count(b"[") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
                raise UserError(f"{source}:{number}: nests deeper than {MAX_DEPTH} levels.")
            if text.count(b'":') > MAX_COLUMNS:
                with contextlib.suppress(json.JSONDecodeError):  # an object may span lines; others are named later
                    parse_row(f"{source}:{number}", text)
    if spread:
        _check_spread(source, path, spread)


def _check_spread(source: str, path: Path, line: int) -> None:
    """Look at objects that span lines as a whole: their depth adds up over lines."""
    content = read_whole(source, path, MAX_ARRAY_BYTES)
    if content is None:
        raise UserError(
            f"{source}:{line}: the row does not begin and end on its line: it is cut off, or rows span lines. In a "
            f"file of more than {MAX_ARRAY_BYTES:,} bytes write one a line."
        )
    if _depth(content) > MAX_DEPTH:
        raise UserError(f"{source} nests deeper than {MAX_DEPTH} levels.")


def _depth(text: bytes) -> int:
    """Return how many brackets outside of strings are open at once, at most."""
    depth = deepest = 0
    for bracket in _STRINGS.sub(b"", text).translate(None, delete=_NO_BRACKETS):
        depth += 1 if bracket in b"{[" else -1
        deepest = max(deepest, depth)
    return deepest


def _check_parquet(source: str, path: Path) -> None:
    with path.open("rb") as file:
        if file.read(4) != b"PAR1":
            raise UserError(f"{source} is not a Parquet file; unpack or convert it.")
    try:
        metadata = pq.read_metadata(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"cannot read {source}: {str(error).strip().splitlines()[0]}") from None
    if metadata.num_rows > path.stat().st_size:
        raise UserError(f"{source} claims {metadata.num_rows:,} rows in fewer bytes; no rows of text are so short.")
    if metadata.num_columns > MAX_COLUMNS:
        raise UserError(f"{source}: has {metadata.num_columns:,} columns; a table may have {MAX_COLUMNS:,}.")
