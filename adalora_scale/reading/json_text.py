"""JSON within limits: its size, depth, repeated keys, numbers and text are looked at before anybody uses it."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import Any

from adalora_scale.errors import UserError
from adalora_scale.reading.text import MAX_DEPTH

MAX_BYTES = 32 * 2**20
"""Largest file. The index of a model with 90,000 tensors has 9 MB; Python's objects take 20 times a file's size."""
_MAX_INTEGER = 2**128
"""Tokenizers write 10^30 for "no limit"."""
_SHOWN = 60


class _Refused(ValueError):
    """What a limit refuses, in words."""


def read_json(path: Path, *, limit: int = MAX_BYTES, finite: bool = True, error: type[UserError] = UserError) -> Any:
    """Read a JSON file.

    Args:
        path: the file; pipes and devices are refused, for they never end.
        limit: its largest size in bytes.
        finite: whether NaN and Infinity are refused, which JSON itself does not know.
        error: what is raised.

    Raises:
        UserError: (as `error`) it cannot be read, is too large or too deep, repeats a key, or is no JSON.
    """
    return parse_json(read_bytes(path, limit=limit, error=error), path, finite=finite, error=error)


def read_object(
    path: Path, *, limit: int = MAX_BYTES, finite: bool = True, error: type[UserError] = UserError
) -> dict[str, Any]:
    """Do what `read_json` does, of a file that must hold a JSON object.

    Raises:
        UserError: (as `error`) as `read_json`, or it holds something else.
    """
    return as_object(read_json(path, limit=limit, finite=finite, error=error), path, error=error)


def as_object(tree: Any, name: Path | str, *, error: type[UserError] = UserError) -> dict[str, Any]:
    """Return a JSON value that must be an object.

    Raises:
        UserError: (as `error`) it is something else.
    """
    if not isinstance(tree, dict):
        raise error(f"{name} must hold a JSON object, not {shown(tree)}.")
    return tree


def parse_json(
    content: bytes | str, name: Path | str, *, finite: bool = True, error: type[UserError] = UserError
) -> Any:
    """Parse JSON text; `name` is what messages call it.

    Raises:
        UserError: (as `error`) as `read_json`.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        tree = json.loads(text, object_pairs_hook=_unique)
        _look_through(tree, finite)
    except RecursionError:  # the parser's own limit, about a thousand
        raise error(f"{name} is nested too deeply (more than {MAX_DEPTH} levels).") from None
    except _Refused as problem:
        raise error(f"{name} {problem}.") from None
    except ValueError as problem:  # not UTF-8, not JSON, an integer of more digits than Python converts
        raise error(f"{name} is not valid JSON ({problem}).") from None
    return tree


def read_bytes(path: Path, *, limit: int = MAX_BYTES, error: type[UserError] = UserError) -> bytes:
    """Read a whole regular file of at most `limit` bytes.

    Raises:
        UserError: (as `error`) it is larger, no regular file, or cannot be read.
    """
    size = file_size(path, error=error)
    if size > limit:
        raise error(f"{path} has {size:,} bytes; at most {limit:,} are read.")
    try:
        with path.open("rb") as file:
            content = file.read(limit + 1)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}.") from None
    if len(content) > limit:
        raise error(f"{path} has more than the {limit:,} bytes that are read.")
    return content


def file_size(path: Path, *, error: type[UserError] = UserError) -> int:
    """Return the bytes of a regular file; pipes and devices are refused before they are opened.

    Raises:
        UserError: (as `error`) there is none.
    """
    try:
        found = os.stat(path)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}.") from None
    except ValueError as problem:  # a name with a null character
        raise error(f"{shown(str(path))} is no file's name ({problem}).") from None
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path} is not a regular file; put the file itself there.")
    return found.st_size


def shown(value: Any) -> str:
    """Return a value of a stranger's file as a message can show it: escaped, and never long."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if isinstance(value, int) and abs(value) > _MAX_INTEGER:
        return "an integer of many digits"
    text = ascii(value[: _SHOWN + 1]) if isinstance(value, str) else str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build an object; two readers of a repeated key would see different files."""
    tree = dict(pairs)
    if len(tree) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise _Refused(f"has the key {shown(twice)} twice")
    return tree


def _look_through(tree: Any, finite: bool) -> None:
    """Look at every value, without recursion."""
    left: list[tuple[Any, int]] = [(tree, 0)]
    while left:
        value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise _Refused(f"is nested too deeply (more than {MAX_DEPTH} levels)")
        if isinstance(value, dict):
            for key in value:
                _look_at_text(key)
            left.extend((inner, depth + 1) for inner in value.values())
        elif isinstance(value, list):
            left.extend((inner, depth + 1) for inner in value)
        elif isinstance(value, str):
            _look_at_text(value)
        elif isinstance(value, float) and finite and not math.isfinite(value):
            raise _Refused(f"holds {value}, which is no number")
        elif isinstance(value, int) and abs(value) >= _MAX_INTEGER:
            raise _Refused("holds an integer of more than 128 bits")


def _look_at_text(text: str) -> None:
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # half of a surrogate pair: nothing could print it
            raise _Refused(f"holds {shown(text)}, which is no text") from None
