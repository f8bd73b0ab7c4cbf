"""Writing a checkpoint while training goes on: copied to host memory, written by a thread, one at a time.

What is written, and in which order, is what `writing.py` writes (`Draft`), with the same bytes. Only how the ranks meet
differs: collectives of a second thread would mix with training's, so a rank's thread tells rank 0's through the process
group's key-value store that its file is on disk, and rank 0's writes the manifest. Whether that went well everybody
learns in `settle`, a collective of the main thread: before the next checkpoint, and before a run ends.

Source: what `torch.distributed.checkpoint.async_save` does, with the store in place of a second process group.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _get_default_store

from adalora_scale.checkpoint.draft import Draft
from adalora_scale.checkpoint.flat import Group
from adalora_scale.checkpoint.staging import Staging
from adalora_scale.checkpoint.writing import agree, discarded_when_failed, open_folder, tried
from adalora_scale.errors import UserError
from adalora_scale.messages import say

_KEY = "adalora_scale/checkpoint/"
_LOOK_EVERY_S = 0.05
_MEETS_S = 1800.0
"""How long rank 0's thread waits for the others' files once its own is written: torch's limit of a collective."""
_NICER = 10
"""How much lower the thread's priority is: a tenth of training's share of a core that both want."""
_GIVES_UP_S = 10.0
"""The same when training has failed, and ranks that are gone will not write theirs."""


class BackgroundWriter:
    """Writes a run's checkpoints in a thread, at most one at a time.

    Args:
        run: the run's name, the same on all ranks and no other run's in this process group.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._staging = Staging()
        self._write: _Write | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank's thread has failed, so that `settle` will raise."""
        return self._write is not None and self._write.problem is not None

    @property
    def done(self) -> bool:
        """Whether this rank's thread has nothing to write (any more)."""
        return self._write is None or not self._write.thread.is_alive()

    def start(
        self,
        draft: Draft,
        groups: Mapping[str, Group],
        extras: Mapping[str, Tensor],
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Copy this rank's state and begin to write it, once the checkpoint before is complete; a collective call.

        Args:
            draft: the checkpoint.
            groups: this rank's pieces; they may change once this returns.
            extras: this rank's further tensors.
            after: called in rank 0's thread when the checkpoint is complete.

        Raises:
            CheckpointError: as `settle`; or the hidden folder cannot be made, or not every rank sees it.
        """
        self.settle()
        copies: list[dict[str, Tensor]] = []
        with discarded_when_failed(draft):
            open_folder(draft, lambda: copies.append(self._staging.copy(groups, draft.names, extras)))
        self._write = _Write(draft, copies[0], after, f"{_KEY}{self._run}/{draft.step}/")

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is complete; a collective call.

        Raises:
            CheckpointError: it could not be written. Raised on all ranks; nothing of it is left behind, and checkpoints
                from before are untouched.
        """
        if self._write is None:
            return
        write, self._write = self._write, None
        with discarded_when_failed(write.draft):
            agree(write.result, write.draft.final)

    def close(self) -> None:
        """Let the checkpoint that is being written become complete if it can, when training has failed; no collective.

        What is not complete is no checkpoint; the next start clears it away.
        """
        if self._write is None:
            return
        write, self._write = self._write, None
        write.give_up()
        write.thread.join()
        if write.problem is not None:
            say(f"note: {write.draft.final.name} is not complete: {write.problem}")


class _Write:
    """One checkpoint on its way, and the thread that writes this rank's part of it."""

    def __init__(self, draft: Draft, tensors: Mapping[str, Tensor], after: Callable[[], None], key: str) -> None:
        self.draft = draft
        self.problem: Exception | None = None
        self._tensors, self._after, self._key = tensors, after, key
        self._store = _get_default_store() if draft.world_size > 1 and dist.is_initialized() else None
        self._patience = _MEETS_S
        # A daemon: a process that is ended on the spot must not wait for its disk.
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def result(self) -> None:
        """Wait for the thread, and raise what it raised."""
        self.thread.join()
        if self.problem is not None:
            raise self.problem

    def give_up(self) -> None:
        """Wait no longer for ranks that may be gone."""
        self._patience = _GIVES_UP_S

    def _run(self) -> None:
        step_back()
        try:
            part = None
            try:
                part = tried(lambda: self.draft.write_own(self._tensors), self.draft.own)
            finally:
                self._tell(part)
            if self.draft.rank == 0 and (everyone := self._everyone(part)) is not None:
                tried(lambda: self.draft.finish(everyone), self.draft.final)
                self._after()
        except Exception as error:  # whatever it is, `result` raises it where somebody hears it
            self.problem = error

    def _tell(self, part: dict[str, Any] | None) -> None:
        """Tell rank 0 that this rank's file is on disk; None: that it failed."""
        if self._store is not None:
            self._store.set(f"{self._key}{self.draft.rank}", json.dumps(part))

    def _everyone(self, own: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Return every rank's part; None where one failed, which that rank says itself.

        Raises:
            UserError: a rank did not tell in time.
        """
        if self._store is None:
            return [own]
        begun = time.monotonic()
        keys = [f"{self._key}{rank}" for rank in range(self.draft.world_size)]
        while not self._store.check(keys):  # never `wait`, which keeps the main thread from the store
            if time.monotonic() - begun > self._patience:
                silent = [str(rank) for rank, key in enumerate(keys) if not self._store.check([key])]
                raise UserError(f"{self.draft.final}: rank {', '.join(silent)} did not write its part in time.")
            time.sleep(_LOOK_EVERY_S)
        parts = [json.loads(self._store.get(key)) for key in keys]
        for key in keys:
            self._store.delete_key(key)
        return None if None in parts else parts


def step_back() -> None:
    """Let training's threads go first on a busy machine: this thread hashes and copies as much as it gets to."""
    if sys.platform == "linux":  # where a thread has a priority of its own
        thread = threading.get_native_id()
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + _NICER)
