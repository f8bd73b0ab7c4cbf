"""A process leaves its group, and gloo's threads are at rest before the interpreter ends."""

from __future__ import annotations

import gc
import logging
import time
from pathlib import Path

import torch.distributed as dist

log = logging.getLogger(__name__)

_TASKS = Path("/proc/self/task")
_QUIET_S = 0.02
_PATIENCE_S = 10.0


def leave_process_group() -> None:
    """Destroy this process's groups, and wait until gloo's threads have let go of what they sent.

    DeepSpeed's globals and FSDP2's meshes keep their groups beyond `destroy_process_group`, and with them gloo's worker
    threads. Such a thread may still hold the tensors of a collective that has ended for everybody else; dropping them
    takes the interpreter's lock, and where the interpreter is ending by then the process aborts ("terminate called
    without an active exception", exit code 134), after all its work was done.

    Source: pytorch#179291, pytorch#190489; both met it.
    """
    if not dist.is_available():
        return
    # Sharded models in reference cycles hold groups, too. A group that is freed here waits for its threads with the
    # interpreter's lock in hand: none of them may still want it to drop a tensor.
    _let_gloo_rest()
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()
    _let_gloo_rest()


def _let_gloo_rest() -> None:
    """Give gloo's threads the interpreter's lock until all of them sleep twice in a row, or are gone."""
    if not _TASKS.is_dir():  # not Linux: nobody says what the threads do
        time.sleep(10 * _QUIET_S)
        return
    quiet, deadline = 0, time.monotonic() + _PATIENCE_S
    while quiet < 2 and (states := _gloo_threads()):
        if time.monotonic() > deadline:
            log.warning("gloo's threads are still at work %g s after the last collective", _PATIENCE_S)
            return
        quiet = quiet + 1 if all(state == "S" for state in states) else 0
        time.sleep(_QUIET_S)


def _gloo_threads() -> list[str]:
    """Return the state of each worker thread, a letter as in proc(5): S sleeps, R runs or waits for a processor."""
    states = []
    for task in _TASKS.iterdir():
        try:
            if "gloo_runloop" in (task / "comm").read_text():
                states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
        except OSError:
            continue  # it has ended
    return states
