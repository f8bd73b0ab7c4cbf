"""A signal asks for a checkpoint and an orderly end, and all ranks agree at which step.

A rank that got a signal notes in the process group's key-value store, at the end of its step t, that training stops
after step t + 1. Nobody ends step t + 1 without this rank's gradients, so everybody finds the note there, whoever got
the signal and when. No collective is added, and nothing is sent but one small request a step to the store.

The store outlives a run: a second one in the same process group must not find the first one's note, so the key ends in
a name that the ranks agreed on for the run.

A rank whose checkpoint could not be written while training went on tells the others in the same way.
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from adalora_scale.training.stopping import stopping

FAILED = "failed"
"""Noted in place of a signal's name by a rank that cannot write its checkpoint."""
_KEY = "adalora_scale/stop_after_step/"


class StopRequest:
    """Asks at each step's end whether a signal stops training there."""

    def __init__(self) -> None:
        self.run = ""
        """The run's name, the same on all ranks and no other run's; set before the first step."""
        self._noted: tuple[int, str] | None = None

    def begin(self) -> None:
        """Forget what stopped an earlier run of this trainer."""
        self._noted = None

    def agreed(self, step: int, reason: str | None = None) -> str | None:
        """Return why all ranks stop now, after `step` completed optimizer steps: a signal's name, or a rank's reason.

        Args:
            step: completed optimizer steps.
            reason: why this rank asks for it, without a signal.
        """
        asked = reason or stopping.received
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return asked
        if self._noted is None:
            store, key = _get_default_store(), _KEY + self.run
            said = ""
            if asked is not None:
                # compare_set answers, so the note is there before this rank goes on; set() would only be on its way.
                said = store.compare_set(key, "", f"{step + 1} {asked}").decode()
            elif store.check([key]):
                said = store.get(key).decode()
            if said:
                number, name = said.split()
                self._noted = int(number), name
        return self._noted[1] if self._noted is not None and step >= self._noted[0] else None
