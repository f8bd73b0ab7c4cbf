"""Files that appear complete or not at all, and the one line that is said when the disk does not take them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adalora_scale.errors import Unsupported, UserError, full_disk, system_reason

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+:/")
"""pathlib makes one slash of two; a letter alone is a drive's."""


@contextlib.contextmanager
def writing(what: str | Path) -> Iterator[None]:
    """Turn what the operating system says while `what` is written into one line.

    Errors about other files (`OSError.filename` is a path outside of `what`) pass: those are not about writing it.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    try:
        yield
    except (UserError, Unsupported):
        raise
    except Exception as error:  # the writers of safetensors and tokenizers are Rust's and raise no OSError
        reason = system_reason(error)
        if reason is None or _is_about_another(error, what):
            raise
        fix = "free some room there, or write to another disk" if full_disk(error) else "write to another folder"
        raise UserError(f"{what} cannot be written: {reason}; {fix}.") from None


def replace_text(path: Path, text: str) -> None:
    """Write a text file: complete and on disk, or what was there before stays. Nothing else is left behind.

    A link stays one, and the file it points to is replaced. Devices and pipes are written to as they are.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    with writing(str(path)):  # a link's file may lie elsewhere
        if _takes_no_rename(path):
            with path.open("a", encoding="utf-8") as file:
                file.write(text)
            return
        real = path.resolve()
        temporary = real.with_name(f".{real.name}.partial")
        try:
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, real)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object; the file appears complete or not at all.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    replace_text(path, json.dumps(value, indent=2, default=str) + "\n")


@contextlib.contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """Give a hidden folder whose files take their places in `directory` when the block ends without an error.

    All of them are complete and on disk before the first takes its place, in the order in which they were written: what
    can fail, fails while the old files still stand. Nothing is left behind then.

    Raises:
        UserError: the disk is full, or the folder cannot be written.
    """
    temporary = directory / ".partial"
    with writing(directory):
        directory.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # of a process that died
        temporary.mkdir()
        try:
            yield temporary
            written = [path for path in temporary.rglob("*") if path.is_file()]
            for path in written:
                sync(path)
            for path in sorted(written, key=lambda path: path.stat().st_mtime_ns):
                final = directory / path.relative_to(temporary)
                final.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, final)
            sync(directory)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def abandon(path: Path) -> None:
    """Rename what a run leaves behind to `abandoned-…`, under a name that nothing has; of a link the link goes."""
    target, number = path.with_name(f"abandoned-{path.name}"), 1
    while target.exists() or target.is_symlink():
        number += 1
        target = path.with_name(f"abandoned-{path.name}-{number}")
    path.rename(target)


def is_url(path: str | Path) -> bool:
    """Whether something given for a path is a URL."""
    return _URL.match(str(path)) is not None


def require_local(what: str, path: str | Path, way_out: str = ", and copy it to the store from there") -> None:
    """Refuse a URL in place of a path: `s3://bucket/run` would become a folder `s3:` here, and go with the machine.

    Args:
        what: the key or argument, for the message.
        path: what was given for it.
        way_out: what to do for a store, behind "name a folder that all machines share".

    Raises:
        UserError: it is a URL.
    """
    if is_url(path):
        raise UserError(
            f"{what}={path} is a URL, and files are written to a file system alone; name a folder that all machines "
            f"share{way_out}."
        )


def write_probe(path: Path) -> None:
    """Write a small file through to the disk: some file systems notice only then that they are full."""
    with open(path, "wb") as file:
        file.write(bytes(4096))
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's entries, are on disk.

    Raises:
        OSError: the disk could not take them.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Wait until everything in a folder is on disk.

    Raises:
        OSError: the disk could not take it.
    """
    for path in folder.rglob("*"):
        if not path.is_symlink():
            sync(path)
    sync(folder)


def _takes_no_rename(path: Path) -> bool:
    """Whether the name is a device's or an open file's: a rename would put a file in the place of /dev/stdout."""
    special = path.exists() and not path.is_file() and not path.is_dir()
    return special or str(path.absolute()).startswith(("/dev/std", "/dev/fd/", "/proc/"))


def _is_about_another(error: Exception, what: str | Path) -> bool:
    if not (isinstance(error, OSError) and isinstance(error.filename, str) and isinstance(what, Path)):
        return False
    where, place = Path(error.filename).absolute(), what.absolute()
    return not (place.is_relative_to(where) or where.is_relative_to(place.parent))
