"""Which process this is by its launcher's word, for what is said or done once before a process group exists."""

from __future__ import annotations

import os
from collections.abc import Mapping


def process_rank(environment: Mapping[str, str] = os.environ) -> int:
    """Return the variable RANK of torchrun, deepspeed or srun; 0 without a launcher.

    A value that is no number counts as 0: `cluster.place.launched` refuses it by name, and that needs a voice.
    """
    return _whole(environment.get("RANK", ""), 0)


def process_count(environment: Mapping[str, str] = os.environ) -> int:
    """Return the variable WORLD_SIZE; 1 without a launcher, and where it is no number."""
    return _whole(environment.get("WORLD_SIZE", ""), 1)


def _whole(value: str, alone: int) -> int:
    return int(value) if value.isdecimal() else alone
