"""How a complete folder takes the place of an earlier one, and what is done with the leftovers of a process that died.

Killed at any moment, either the old folder or the new one is at its name, whole: the two swap names in one call
(`renameat2` with RENAME_EXCHANGE). Where the file system cannot do that there are two renames, and between them the old
folder is beside its name; the next call puts it back.

Beside `NAME` there are meanwhile `.NAME.partial-PID-HOST`, the new folder (after the swap the old one, until it is
deleted), and with two renames `.NAME.replaced-PID-HOST`, the old one.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import socket
from pathlib import Path

from adalora_scale.export.record import REPORT_NAME, remove_written
from adalora_scale.files import sync

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_CANNOT_SWAP = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}


def names_beside(target: Path) -> tuple[Path, Path]:
    """Return the hidden names that this process uses: of the new folder, and of the old one between two renames."""
    own = f"{os.getpid()}-{socket.gethostname()}"
    return target.with_name(f".{target.name}.partial-{own}"), target.with_name(f".{target.name}.replaced-{own}")


def publish(partial: Path, target: Path) -> Path | None:
    """Give a complete folder, whose files are on disk, its name.

    Args:
        partial: the folder, under its hidden name beside the target.
        target: absent, an empty folder, or an earlier one to replace.

    Returns:
        Where the earlier folder is now, for the caller to delete.

    Raises:
        OSError: it cannot be renamed; the earlier folder is at its name.
    """
    replaced: Path | None = None
    if not target.exists() or not any(target.iterdir()):
        os.rename(partial, target)
    elif swap(partial, target):
        replaced = partial
    else:
        replaced = names_beside(target)[1]
        os.rename(target, replaced)
        try:
            os.rename(partial, target)
        except BaseException:
            os.rename(replaced, target)
            raise
    sync(target.parent)
    return replaced


def swap(one: Path, other: Path) -> bool:
    """Let two folders exchange their names in one step; False where the system or the file system cannot.

    Raises:
        OSError: it can, and failed.
    """
    try:
        exchange = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):  # not Linux, or a C library from before 2018
        return False
    if exchange(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT_SWAP:
        return False
    raise OSError(code, os.strerror(code), str(other))


def discard(partial: Path) -> bool:
    """Delete a folder under a hidden name of the form `partial`, and return whether it is gone.

    One with a record is complete, or the old one after a swap, and loses what the record lists; one without is half a
    folder and goes whole.
    """
    if (partial / REPORT_NAME).exists():
        return remove_written(partial)
    shutil.rmtree(partial, ignore_errors=True)
    return not partial.exists()


def tidy(target: Path) -> list[str]:
    """Clear up what calls that died have left beside the target, and return what there is to say about it.

    An earlier folder that is not at its name is put back. What may be of a process that still runs, here or on another
    host, is named and stays.

    Raises:
        OSError: a folder cannot be renamed or deleted.
    """
    pattern = re.compile(re.escape(f".{target.name}.") + r"(?P<kind>partial|replaced)-(?P<pid>\d+)(?:-(?P<host>.+))?")
    beside = target.parent.iterdir() if target.parent.is_dir() else ()
    found = [(path, match) for path in beside if (match := pattern.fullmatch(path.name))]
    # The newest first: of several earlier folders it was at the target last.
    found.sort(key=lambda pair: pair[0].lstat().st_mtime, reverse=True)
    said: list[str] = []
    for path, match in found:
        if path.is_symlink() or not path.is_dir() or _may_live(int(match["pid"]), match["host"]):
            said.append(f"{path} stays: the process {match['pid']} that it names may still write it; else remove it")
        elif match["kind"] == "partial":
            if not discard(path):
                said.append(
                    f"{path} stays: a call that died left it, and it holds what its {REPORT_NAME} does not list"
                )
        elif not os.path.lexists(target):
            os.rename(path, target)
            said.append(f"an earlier call died while it replaced {target}; what was there before is back")
        elif not remove_written(path):
            said.append(f"{path} stays: a call that died left it, what was at {target} before; remove it by hand")
    return said


def _may_live(pid: int, host: str | None) -> bool:
    if host not in (None, socket.gethostname()):
        return True
    if pid == os.getpid():  # containers count from 1 again; this process has only begun
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True
