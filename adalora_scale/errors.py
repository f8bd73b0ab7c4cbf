"""The two kinds of error a user can cause, and the one place that turns them into a line and an exit code.

`UserError` is a broken contract (a bad key, file or value); `Unsupported` is a combination that cannot be right
here. Both carry one sentence that names the thing and the way out. Everything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable

USER_ERROR_EXIT_CODE = 2
INTERRUPTED_EXIT_CODE = 85
"""A signal stopped the run, a checkpoint is there, and `training.resume_from_checkpoint=auto` goes on from it."""


class UserError(ValueError):
    """The user broke a contract; the message is one line naming the key or file and the fix."""


class Unsupported(NotImplementedError):
    """The request is well-formed but not supported; the message names it and what to use instead."""


class Interrupted(SystemExit):
    """A signal stopped training after a checkpoint; uncaught, it ends the process with `INTERRUPTED_EXIT_CODE`."""

    def __init__(self, message: str) -> None:
        super().__init__(INTERRUPTED_EXIT_CODE)
        self.message = message

    def __str__(self) -> str:
        return self.message


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest candidate, or the empty string."""
    close = difflib.get_close_matches(name, list(candidates), n=1, cutoff=0.5)
    return f" Did you mean '{close[0]}'?" if close else ""


def run_reporting_errors(main: Callable[[], int | None]) -> int:
    """Run `main` and turn user errors into one line on standard error and exit code 2.

    All ranks of a distributed job usually fail on the same thing, so rank 0 speaks at once and the others wait a few
    seconds: the launcher ends them when rank 0 exits. A rank that fails alone is still there to say why.

    Set ``ADALORA_TRACEBACK=1`` to see the traceback instead.
    """
    try:
        return main() or 0
    except (UserError, Unsupported) as error:
        if os.environ.get("ADALORA_TRACEBACK", "0") not in ("", "0"):
            raise
        rank = int(os.environ.get("RANK", "0"))
        prefix = "error"
        if rank != 0:
            time.sleep(5)
            prefix = f"error (rank {rank})"
        message = " ".join(str(error).split())
        print(f"{prefix}: {message}", file=sys.stderr, flush=True)
        return USER_ERROR_EXIT_CODE
