"""The ranks that a launcher started: who they are, a store they share before any process group, the group itself."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from adalora_scale.cluster.leaving import leave_process_group
from adalora_scale.cluster.place import Place
from adalora_scale.errors import UserError


class RanksSilent(RuntimeError):
    """Some ranks did not answer in time; the message names them."""


class Board:
    """A notice board all ranks can read, on the store that a process group will use later; no collective is involved.

    Rank 0 reads what every rank pinned and pins what all shall know. The store must outlive the last use of the
    process group: under deepspeed and srun rank 0's process serves it.

    Args:
        place: this process's place.
        timeout_s: seconds to wait for a rank that says nothing.
    """

    def __init__(self, place: Place, *, timeout_s: float) -> None:
        self.place = place
        self.timeout_s = timeout_s
        try:
            store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=_seconds(timeout_s)))
        except (dist.DistError, OSError, ValueError) as error:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(
                f"rank {place.rank} cannot meet the others at MASTER_ADDR:MASTER_PORT {address} "
                f"({str(error).splitlines()[0]}); is the address right, the port free, the network open?"
            ) from None
        self.store = store
        self._pins = dist.PrefixStore("adalora_preflight", store)

    def collect(self, name: str, value: Any) -> list[Any] | None:
        """Pin a JSON value under `name`; rank 0 waits for everyone's and returns them in rank order, others None.

        Raises:
            RanksSilent: rank 0 did not see every rank's within the time-out.
        """
        self._pins.set(f"{name}.{self.place.rank}", json.dumps(value))
        if self.place.rank != 0:
            return None
        keys = [f"{name}.{rank}" for rank in range(self.place.world_size)]
        try:
            self._pins.wait(keys, _seconds(self.timeout_s))
        except dist.DistError:
            silent = [rank for rank, key in enumerate(keys) if not self._pins.check([key])]
            raise RanksSilent(f"no word from {ranks_text(silent)} about '{name}' within {self.timeout_s:g} s") from None
        return [json.loads(value) for value in self._pins.multi_get(keys)]

    def announce(self, name: str, value: Any = None) -> Any:
        """Return rank 0's value on every rank; rank 0 waits for nobody.

        Raises:
            RanksSilent: rank 0 did not speak within the time-out.
        """
        if self.place.rank == 0:
            self._pins.set(name, json.dumps(value))
            return value
        try:
            # Rank 0 may itself be waiting for a silent rank; it has the first word on that.
            self._pins.wait([name], _seconds(2 * self.timeout_s + 10))
        except dist.DistError:
            raise RanksSilent(f"no word from rank 0 about '{name}'") from None
        return json.loads(self._pins.get(name))

    def leave(self) -> None:
        """Let rank 0, whose process may serve the store, go last; nobody waits longer than five seconds."""
        try:
            self._pins.add("left", 1)
            deadline = time.monotonic() + 5
            while self.place.rank == 0 and time.monotonic() < deadline:
                if self._pins.add("left", 0) >= self.place.world_size:
                    return
                time.sleep(0.02)
        except dist.DistError:
            pass  # rank 0 has gone already, there is nothing left to read


@contextlib.contextmanager
def process_group(place: Place, store: dist.Store | None = None, *, timeout_s: float = 1800) -> Iterator[torch.device]:
    """Join the launcher's ranks: NCCL where every rank of this host has a GPU of its own, else gloo on the CPU."""
    if torch.cuda.device_count() >= place.local_world_size:
        device, backend = torch.device("cuda", place.local_rank), "nccl"
        torch.cuda.set_device(device)
    else:
        device, backend = torch.device("cpu"), "gloo"
        os.environ["DS_ACCELERATOR"] = "cpu"
    dist.init_process_group(
        backend, store=store, rank=place.rank, world_size=place.world_size, timeout=_seconds(timeout_s)
    )
    try:
        yield device
    finally:
        if sys.exc_info()[0] is None:
            leave_process_group()


def ranks_text(ranks: list[int]) -> str:
    """Return ``rank 3`` or ``ranks 0–2, 5``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    words = [f"{run[0]}" if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs]
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(words)}"


def _seconds(value: float) -> timedelta:
    return timedelta(seconds=value)
