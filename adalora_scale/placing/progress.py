"""What is shown while a base is read: a bar on a terminal, and a line at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch.distributed as dist
from tqdm.auto import tqdm

from adalora_scale.messages import say
from adalora_scale.quantization.plan import LoadingPlan, Slot


class progress:
    """A bar over the tensors on rank 0's terminal, and a line with bytes and seconds when all are there.

    The block gets a function to call after each tensor.
    """

    def __init__(self, plan: LoadingPlan) -> None:
        self._plan = plan
        self._main = not dist.is_initialized() or dist.get_rank() == 0

    def __enter__(self) -> Callable[[Slot], None]:
        self._started = time.perf_counter()
        shown = self._main and sys.stderr.isatty()
        self._bar = tqdm(total=len(self._plan.slots), desc="loading", unit="tensor", disable=not shown)
        return self._advance

    def _advance(self, slot: Slot) -> None:
        self._bar.update()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._bar.close()
        if self._main and kind is None:
            read = self._plan.checkpoint.bytes_read
            seconds = time.perf_counter() - self._started
            note(f"base read: {read / 2**20:,.1f} MiB by this rank in {seconds:.1f} s")
            if ignored := self._plan.ignored:
                note(f"not used of the checkpoint: {', '.join(ignored[:3])}{' …' * (len(ignored) > 3)}")


def note(line: str) -> None:
    """Say something that is no result: standard output may be somebody's JSON."""
    say(line, to=sys.stderr)
