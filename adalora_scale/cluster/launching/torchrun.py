"""`python -m adalora_scale.cluster.launching.torchrun …` is torchrun that says in a line what ended it.

A signal (Ctrl-C among them) leaves torchrun by an exception of its own, whose traceback stands behind the ranks' last
words; so does a rank that was refused, ended by request or gave up, and has said so itself. Both are an exit
code here.
"""

from __future__ import annotations

import sys

from adalora_scale.errors import (
    INTERRUPTED_EXIT_CODE,
    KEYBOARD_EXIT_CODE,
    USER_ERROR_EXIT_CODE,
    WRONG_END_EXIT_CODE,
)
from adalora_scale.messages import say

_SAID = (USER_ERROR_EXIT_CODE, WRONG_END_EXIT_CODE, INTERRUPTED_EXIT_CODE, KEYBOARD_EXIT_CODE)
"""Exit codes of ranks that have said themselves why they end."""


def main() -> int:
    """Run torchrun with this process's arguments; return 128 + the signal that ended it, or the first failed rank's
    exit code where that rank has said why."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun()
    except SignalException as error:
        return 128 + int(error.sigval)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode not in _SAID:
            raise
        say(f"torchrun: rank {rank} ended with exit code {failure.exitcode}, see above", to=sys.stderr)
        return int(failure.exitcode)
    return 0


if __name__ == "__main__":
    sys.exit(main())
