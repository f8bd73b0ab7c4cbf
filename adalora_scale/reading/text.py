"""Reading the text files that people and strangers write: whole, but never without bound, and never from a pipe."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path
from typing import Any

from adalora_scale.errors import UserError

MAX_TEXT_BYTES = 2**20
"""Of a config, a hostfile, a template or a sample text; the largest that people write by hand are a tenth of it."""

MAX_DEPTH = 50
"""Lists and mappings inside one another."""


def read_text(path: str | Path, what: str, *, limit: int = MAX_TEXT_BYTES) -> str:
    """Return a UTF-8 text file's content, a leading byte order mark left out.

    Args:
        path: the file.
        what: its name in messages, for example "the hostfile", or a key with its equals sign: "engine.config=".
        limit: bytes it may have.

    Raises:
        UserError: it cannot be read, is a folder, pipe or device, is longer than `limit`, or is not UTF-8 text.
    """
    content = _read(path, what, limit)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{_name(what, path)} is not UTF-8 text; save it as UTF-8.") from None
    if "\0" in text:
        raise UserError(f"{_name(what, path)} is not UTF-8 text: it holds NUL bytes; save it as UTF-8.")
    return text


def nests_deeper(tree: Any, depth: int) -> bool:
    """Whether lists and mappings stand more than `depth` levels inside one another."""
    level = [tree]
    for _ in range(depth + 1):
        level = [value for value in level if isinstance(value, dict | list)]
        if not level:
            return False
        level = [inner for value in level for inner in (value.values() if isinstance(value, dict) else value)]
    return True


def whole_number(text: str | int) -> int:
    """Return a whole number of at most 64 bits, for ``json.loads(parse_int=…)``.

    Raises:
        ValueError: it is larger; arithmetic with it may fail or never end, and it cannot be printed.
    """
    value = int(text) if isinstance(text, int) or len(text) <= 20 else 2**64
    if not -(2**63) <= value < 2**64:
        raise ValueError("a whole number of more than 64 bits")
    return value


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object's keys and values, for ``json.loads(object_pairs_hook=…)``.

    Raises:
        ValueError: a key stands there twice; readers would differ on which value counts.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{twice}' stands there twice")
    return found


def _read(path: str | Path, what: str, limit: int) -> bytes:
    try:
        _refuse_special(os.stat(path), path, what)  # first: opening a device may already do something
        # A pipe that takes the file's place now would be waited for at open; the flag changes nothing for files.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb", buffering=0) as file:
            _refuse_special(os.fstat(descriptor), path, what)
            content = io.BufferedReader(file).read(limit + 1)
    except OSError as error:
        raise UserError(f"{_name(what, path)} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{_name(what, path)} cannot be read: no file has such a name.") from None  # a NUL in it
    if len(content) > limit:
        raise UserError(f"{_name(what, path)} is longer than {limit:,} bytes, which no such file needs.")
    return content


def _name(what: str, path: str | Path) -> str:
    return f"{what}{path}" if what.endswith("=") else f"{what} {path}"


def _refuse_special(status: os.stat_result, path: str | Path, what: str) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{_name(what, path)} cannot be read: Is a directory; name a file in it.")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{_name(what, path)} is a pipe or a device; write its content to a file and name that.")
