"""What a name in `data.train` or `data.eval` can be, told without opening it: a path or a hub id, and a file's kind."""

from __future__ import annotations

import glob
import os
import stat
from pathlib import Path

from adalora_scale.errors import UserError, nearest

_TEMPLATES = Path(__file__).parent / "chat_templates"

PACKED = (".gz", ".zst")
"""Endings of packed files, behind the ending of what is in them."""
KINDS = {".jsonl": "json", ".json": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
"""Ending of a data file -> what is in it; those of text may be followed by one of `PACKED`."""
ENDINGS = f"{', '.join(KINDS)}; of text also with {' or '.join(PACKED)} behind it"
"""The endings, in words."""


def is_packed(path: Path) -> bool:
    """Whether a file's name ends in `.gz` or `.zst`."""
    return path.suffix.lower() in PACKED


def inner_name(path: Path) -> Path:
    """Return the name of what is in a file, without the ending of its packing."""
    return path.with_suffix("") if is_packed(path) else path


def kind_of(path: Path) -> str | None:
    """Return what is in a file, by its name: `json`, `csv` (or tabs) or `parquet`; None for an ending nobody reads."""
    kind = KINDS.get(inner_name(path).suffix.lower())
    return None if kind == "parquet" and is_packed(path) else kind


def local_path(source: str) -> Path:
    """Return the path that a user wrote, `~` replaced.

    Raises:
        UserError: there is no such user.
    """
    try:
        return Path(source).expanduser()
    except RuntimeError:
        raise UserError(f"{source}: there is no such user; write the whole path.") from None


def is_local(name: str) -> bool:
    """Tell a path from a hub id: a known ending, an existing path, or a form no hub id can have."""
    path = local_path(name)
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or glob.has_magic(name)
    return kind_of(path) is not None or path.suffix.lower() in PACKED or looks_like_path or os.path.lexists(path)


def refuse_special(source: str, path: Path) -> int:
    """Return the bytes of a regular file that can be opened.

    Raises:
        UserError: it is a folder, a pipe or a device, or is not there.
    """
    try:
        status = os.stat(path)
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)) if stat.S_ISREG(status.st_mode) else None
    except FileNotFoundError:
        raise UserError(f"data file {source} does not exist (looked in {Path.cwd()}).") from None
    except OSError as error:
        raise UserError(f"data file {source} cannot be read: {error.strerror}.") from None
    except ValueError:  # a NUL in the name
        raise UserError(f"data file {source} cannot be read: no file has such a name.") from None
    if stat.S_ISDIR(status.st_mode):
        raise UserError(f"{source} is a directory, not a file of rows.")
    if not stat.S_ISREG(status.st_mode):
        raise UserError(f"{source} is a pipe or a device; write the rows to a file and name that.")
    return status.st_size


def look(source: str) -> None:
    """See that a name stands for something that is there, as far as this is known without opening it.

    Hub ids, folders and patterns are looked at by whoever reads them.

    Raises:
        UserError: it is a file that is missing, empty, or of a kind that nobody reads.
    """
    path = local_path(source)
    if not is_local(source) or os.path.isdir(path) or (glob.has_magic(source) and not os.path.lexists(path)):
        return
    size = refuse_special(source, path)
    if kind_of(path) is None:
        ending = "".join(path.suffixes[-2:]) if is_packed(path) else path.suffix
        raise UserError(f"{source} has an unknown extension '{ending}'; supported: {ENDINGS}.")
    if size == 0:
        raise UserError(f"data file {source} is empty.")


def builtin_chat_templates() -> list[str]:
    """Return the names `data.chat_template` accepts without a file."""
    return sorted(path.stem for path in _TEMPLATES.glob("*.jinja"))


def template_file(name: str) -> Path:
    """Return the file of a chat template, a built-in one or the user's.

    Raises:
        UserError: there is none.
    """
    known = builtin_chat_templates()
    path = _TEMPLATES / f"{name}.jinja" if name in known else Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"data.chat_template={name} is neither a built-in template nor a Jinja file.{nearest(name, known)} "
            f"Built-in: {', '.join(known)}."
        )
    return path
