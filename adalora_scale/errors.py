"""The errors that are meant for people, and the one place that turns them into a line and an exit code.

`UserError` is a broken contract (a bad key, file or value); `Unsupported` is a combination that cannot be right here;
`WrongEnd` is a run that would leave what nobody can use. All carry one sentence that names the thing and the way out.
Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import sys
import time
from collections.abc import Callable, Iterable

from adalora_scale.messages import one_line, say
from adalora_scale.process_rank import process_rank

USER_ERROR_EXIT_CODE = 2
WRONG_END_EXIT_CODE = 3
INTERRUPTED_EXIT_CODE = 85
"""A signal stopped the run, and `training.resume_from_checkpoint=auto` goes on from the last checkpoint."""
KEYBOARD_EXIT_CODE = 130
"""The same by SIGINT; shells give it to what Ctrl-C ended."""


_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_RUST = re.compile(r"\(os error (\d+)\)")


class UserError(ValueError):
    """The user broke a contract; the message is one line naming the key or file and the fix."""


class Unsupported(NotImplementedError):
    """The request is well-formed but not supported; the message names it and what to use instead."""


class WrongEnd(RuntimeError):
    """Training ran, and what it would leave is wrong: no numbers, nothing trained, or not at its budget."""


class Interrupted(SystemExit):
    """A signal stopped a run; uncaught, it ends the process with `INTERRUPTED_EXIT_CODE`, or `KEYBOARD_EXIT_CODE`."""

    def __init__(self, message: str, code: int = INTERRUPTED_EXIT_CODE) -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message


def nearest(name: str, candidates: Iterable[str], *, cutoff: float = 0.5) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest candidate; empty where none is as close as `cutoff`."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=cutoff)
    return f" Did you mean '{close[0]}'?" if close else ""


def system_reason(error: BaseException) -> str | None:
    """Return the operating system's reason for an error, of Rust's exceptions too; None where it has none."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = _code(error)
    return None if code is None else os.strerror(code)


def full_disk(error: BaseException) -> str | None:
    """Return the reason where a disk, a quota or a limit on a file's size was reached; None for other errors."""
    return system_reason(error) if _code(error) in _FULL else None


def _code(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    said = _RUST.search(str(error))  # of safetensors and tokenizers
    return int(said.group(1)) if said else None


def run_reporting_errors(main: Callable[[], int | None]) -> int:
    """Run `main` and turn errors that are meant for people into one line on standard error and exit code 2, or 3.

    All ranks of a distributed job usually fail on the same thing, so rank 0 speaks at once and the others wait a few
    seconds: the launcher ends them when rank 0 exits. A rank that fails alone is still there to say why.

    A full disk is never a bug, wherever it is met (a cache, a temporary folder, what standard output goes to): writers
    name what they wrote, for the rest the line comes from here.

    Set ``ADALORA_TRACEBACK=1`` to see the traceback instead.
    """
    try:
        code = main() or 0
        _flush_standard_output()
        return code
    except Exception as error:
        message = _message(error)
        if message is None or os.environ.get("ADALORA_TRACEBACK", "0") not in ("", "0"):
            raise
        rank = process_rank()
        prefix = "error"
        if rank != 0:
            time.sleep(5)
            prefix = f"error (rank {rank})"
        say(f"{prefix}: {one_line(message)}", to=sys.stderr)
        return WRONG_END_EXIT_CODE if isinstance(error, WrongEnd) else USER_ERROR_EXIT_CODE


def _message(error: Exception) -> str | None:
    """Return what the user is told; None of a bug."""
    if isinstance(error, UserError | Unsupported | WrongEnd):
        return str(error)
    if (reason := full_disk(error)) is None:
        return None
    name = getattr(error, "filename", None) or "a file, or standard output,"
    return f"{name} cannot be written: {reason}; free some room, or write to another disk."


def _flush_standard_output() -> None:
    """See that what was printed has arrived; Python looks at its very end only, and has no line for it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough
        pass
    except OSError as error:
        with contextlib.suppress(OSError, ValueError):  # Python flushes once more
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise UserError(f"standard output cannot be written: {error.strerror}; write to another disk.") from None
