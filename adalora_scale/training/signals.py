"""SIGTERM and SIGUSR1 ask for a checkpoint and an orderly end, and all ranks agree at which step.

A rank that got a signal notes in the process group's key-value store, at the end of its step t, that training stops
after step t + 1. Nobody ends step t + 1 without this rank's gradients, so everybody finds the note there, whoever got
the signal and when. No collective is added, and nothing is sent but one small request a step to the store.

The store outlives a run: a second one in the same process group must not find the first one's note, so the key ends in
a name that the ranks agreed on for the run.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_KEY = "adalora_scale/stop_after_step/"


class StopRequest:
    """Knows whether training must stop; `listening()` installs handlers, `agreed(step)` asks at a step's end."""

    def __init__(self) -> None:
        self.received: str | None = None
        """Name of the signal that this process got."""
        self.run = ""
        """The run's name, the same on all ranks and no other run's; set before the first step."""
        self._stop_after: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Take the signals while inside; outside the main thread Python allows no handlers and nothing happens.

        What stopped an earlier run of this trainer is forgotten.
        """
        self.received = self._stop_after = None
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self, step: int) -> bool:
        """Return whether all ranks stop now, after they completed `step` optimizer steps."""
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return self.received is not None
        if self._stop_after is None:
            store, key = _get_default_store(), _KEY + self.run
            if self.received is not None:
                # compare_set answers, so the note is there before this rank goes on; set() would only be on its way.
                self._stop_after = int(store.compare_set(key, "", str(step + 1)))
            elif store.check([key]):
                self._stop_after = int(store.get(key))
        return self._stop_after is not None and step >= self._stop_after

    def _note(self, number: int, frame: FrameType | None) -> Any:
        self.received = signal.Signals(number).name
