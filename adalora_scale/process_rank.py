"""Which process this is by its launcher's word, for what is said or done once before a process group exists."""

from __future__ import annotations

import os


def process_rank() -> int:
    """Return the variable RANK of torchrun, deepspeed or srun; 0 without a launcher.

    A value that is no number counts as 0: `cluster.place.launched` refuses it by name, and that needs a voice.
    """
    return _whole("RANK", 0)


def process_count() -> int:
    """Return the variable WORLD_SIZE; 1 without a launcher, and where it is no number."""
    return _whole("WORLD_SIZE", 1)


def _whole(name: str, alone: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else alone
