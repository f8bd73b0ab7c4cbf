"""Waiting for a torch extension that another process compiles, without waiting for one that nobody compiles any more.

torch.utils.cpp_extension (2.13) makes a file `lock` in an operator's build folder, keeps it open while it compiles, and
waits without end for such a file of another process. A build that was killed leaves its file behind.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from torch.utils.file_baton import FileBaton

from adalora_scale.errors import UserError
from adalora_scale.messages import say
from adalora_scale.process_rank import process_rank

NOTE_AFTER_S = 30.0
STALE_AFTER_S = 300.0
"""A compiler writes into the folder when a file is done: long, but not this long, for DeepSpeed's operators."""
_LOOKED_AT_S = 5.0
"""How long a file is looked at before it counts as old: clocks of file servers differ."""


@contextlib.contextmanager
def bounded_build_waits(*, note_after: float = NOTE_AFTER_S, stale_after: float = STALE_AFTER_S) -> Iterator[None]:
    """Let waits for another process's build, in this block, say what they wait for and end when nobody builds.

    A build counts as dead when no process of this machine has the lock file open and nothing in its folder changed for
    `stale_after` seconds: the builder may be on another machine, which shares the folder.

    Args:
        note_after, stale_after: seconds.

    Raises:
        UserError: in the waiting thread, naming the file.
    """
    before = FileBaton.wait

    def wait(self: FileBaton) -> None:
        _wait(Path(self.lock_file_path), self.wait_seconds, note_after, stale_after)

    FileBaton.wait = wait  # type: ignore[method-assign]
    try:
        yield
    finally:
        FileBaton.wait = before  # type: ignore[method-assign]


def _wait(lock: Path, every: float, note_after: float, stale_after: float) -> None:
    started, noted, looked = time.monotonic(), False, 0.0
    while lock.exists():
        waited = time.monotonic() - started
        if waited > note_after and not noted:
            noted = True
            _note(f"waiting for {lock}: another process is compiling an operator there")
        if waited > looked and waited > min(_LOOKED_AT_S, stale_after):
            looked = waited + 1.0
            idle = _idle_seconds(lock)
            if idle is not None and idle > stale_after and not _held_here(lock):
                raise UserError(
                    f"{lock} was left behind by a build that was killed (nothing in its folder changed for "
                    f"{idle / 60:.0f} minutes and no process here holds it), and every run waits for it: delete it."
                )
        time.sleep(every)


def _idle_seconds(lock: Path) -> float | None:
    """Return how long ago something in the folder changed last; None where the lock is gone."""
    changed = []
    for path in (lock, *lock.parent.glob("*")):
        with contextlib.suppress(OSError):
            changed.append(path.stat().st_mtime)
    return time.time() - max(changed) if lock.exists() and changed else None


def _held_here(lock: Path) -> bool:
    """Return whether a process that this user may look into has the file open."""
    try:
        wanted = lock.stat()
    except OSError:
        return True  # gone just now
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            found = os.stat(descriptor)
            if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                return True
    return False


def _note(line: str) -> None:
    if process_rank() == 0:
        say(line, to=sys.stderr)
