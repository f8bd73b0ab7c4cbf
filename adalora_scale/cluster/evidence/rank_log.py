"""One log a rank: everything a rank and its libraries print, C++ included, in `<log folder>/<host>.<rank>.log`.

Switched on by the launch scripts through ADALORA_LOG_DIR. Rank 0 keeps speaking on the console too.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from adalora_scale.cluster.evidence.hang import HangWatch
from adalora_scale.cluster.evidence.status import (
    LOG_DIR,
    Failure,
    Status,
    starting,
)
from adalora_scale.errors import INTERRUPTED_EXIT_CODE, KEYBOARD_EXIT_CODE, USER_ERROR_EXIT_CODE, UserError
from adalora_scale.files import writing
from adalora_scale.messages import say

_PEER_TROUBLE = re.compile(
    r"Connection closed by peer|Connection reset by peer|Broken pipe|Connection refused|Timed out waiting"
    r"|Socket Timeout|failed to recv|watchdog|ncclRemoteError|ncclSystemError|NCCL communicator was aborted"
    r"|Application timeout|monitoredBarrier|wait timeout|Read error",
    re.IGNORECASE,
)
_LATE = re.compile(r"time(d )?-?out", re.IGNORECASE)
_PROJECT = re.compile(r"[\\/](adalora_scale|launch)[\\/]")


@contextlib.contextmanager
def rank_log() -> Iterator[None]:
    """Keep the log and the status of this rank while the body runs; does nothing without ADALORA_LOG_DIR.

    An exception is printed, recorded as this rank's failure, and raised on. One that only reports missing peers first
    gathers every rank's flight record, see `HangWatch`. Where the folder takes no files, the exit code is 2.
    """
    if not os.environ.get(LOG_DIR):
        yield
        return
    folder = Path(os.environ[LOG_DIR])
    status = starting()
    if not _written(status, folder):
        raise SystemExit(USER_ERROR_EXIT_CODE)
    _redirect(folder / f"{status.name}.log", keep_console=status.rank == 0)
    say(f"== {_now()} rank {status.rank} of {status.world_size} on {status.host}, pid {status.pid}")
    watch = HangWatch(folder, status)
    try:
        yield
    except SystemExit as end:
        if not _finish(folder, _ended_by_exit(status, end, folder), watch) and end.code in (None, 0):
            raise SystemExit(USER_ERROR_EXIT_CODE) from None
        raise
    except BaseException as error:
        traceback.print_exc()
        failure = describe(error)
        hang = watch.collect(late=bool(_LATE.search(failure.message))) if failure.from_peers else None
        if hang:
            say(f"hang: {hang}", to=sys.stderr)
        _finish(folder, status.finished("failed", failure, hang), watch)
        raise SystemExit(1) from None
    else:
        if not _finish(folder, status.finished("done"), watch):
            raise SystemExit(USER_ERROR_EXIT_CODE)


def describe(error: BaseException) -> Failure:
    """Return what is worth knowing of an exception in one line."""
    lines = str(error).strip().splitlines() or [""]
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if _PROJECT.search(frame.filename)]
    place = (ours or frames)[-1] if frames else None
    return Failure(
        type=type(error).__name__,
        message=lines[0],
        place=f"{_short(place.filename)}:{place.lineno} in {place.name}" if place else "",
        from_peers=is_peer_trouble(error),
    )


def is_peer_trouble(error: BaseException) -> bool:
    """Return whether the exception says no more than that other ranks were gone or late."""
    if type(error).__name__ in ("DistBackendError", "DistNetworkError", "DistStoreError"):
        return True
    return isinstance(error, RuntimeError | ConnectionError | TimeoutError) and bool(_PEER_TROUBLE.search(str(error)))


def _ended_by_exit(status: Status, end: SystemExit, folder: Path) -> Status:
    code = end.code if isinstance(end.code, int) else int(end.code is not None)
    if code == 0:
        return status.finished("done")
    if code in (INTERRUPTED_EXIT_CODE, KEYBOARD_EXIT_CODE):
        return status.finished("checkpointed")
    message = "see the log"
    if code == USER_ERROR_EXIT_CODE:  # its line was printed by run_reporting_errors
        sys.stderr.flush()
        errors = [line for line in _tail(folder / f"{status.name}.log") if line.startswith("error")]
        message = errors[-1] if errors else message
    elif isinstance(end.code, str):
        message = end.code
    return status.finished("failed", Failure(type=f"exit code {code}", message=message, place="", from_peers=False))


def _finish(folder: Path, status: Status, watch: HangWatch) -> bool:
    watch.close()
    written = _written(status, folder)
    say(f"== {_now()} rank {status.rank} {status.state}")
    return written


def _written(status: Status, folder: Path) -> bool:
    """Write the status; where that fails, say why in one line and return False."""
    try:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        status.write(folder)
    except UserError as error:
        say(f"error: {LOG_DIR}: {error}", to=sys.stderr)
        return False
    return True


def _redirect(path: Path, *, keep_console: bool) -> None:
    """Send file descriptors 1 and 2 to `path`, so that C++ and child processes are in it too."""
    sys.stdout.flush()
    sys.stderr.flush()
    if not keep_console:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    else:
        # tee outlives this process by the time it needs to write the last lines: signals meant for ranks pass it by.
        ignored = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            source, target = os.pipe()
            subprocess.Popen(["tee", "-a", "-i", str(path)], stdin=source)
            os.close(source)
        finally:
            for number, handler in ignored.items():
                signal.signal(number, handler)
    os.dup2(target, 1)
    os.dup2(target, 2)
    os.close(target)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _tail(path: Path, size: int = 8192) -> list[str]:
    for _ in range(10):  # tee may be a moment behind
        try:
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - size))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            lines = []
        if any(line.startswith("error") for line in lines):
            return lines
        time.sleep(0.05)
    return lines


def _short(path: str) -> str:
    found = _PROJECT.search(path)
    return path[found.start() + 1 :] if found else path.split("site-packages/")[-1]


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
