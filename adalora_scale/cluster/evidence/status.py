"""One small file a rank that says where it runs and how it ended: `<host>.<rank>.status.json` in the log folder.

A rank that was killed cannot write its end, so its status stays "running": that silence is what names a lost host.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from adalora_scale.files import replace_text
from adalora_scale.process_rank import process_count, process_rank

LOG_DIR = "ADALORA_LOG_DIR"
HOST = "ADALORA_HOST"
_SUFFIX = ".status.json"
State = Literal["running", "done", "checkpointed", "failed"]


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Why a rank ended."""

    type: str
    """The exception's class, or `exit code N`."""
    message: str
    """Its first line."""
    place: str
    """File, line and function of the innermost frame of this project, or of all frames."""
    from_peers: bool
    """Whether it only says that other ranks were gone or late: the reason is theirs."""


@dataclass(frozen=True, kw_only=True)
class Status:
    """What is known of one rank."""

    host: str
    rank: int
    world_size: int
    pid: int
    started: float
    """Seconds since the epoch."""
    addresses: tuple[str, ...] = ()
    """Addresses of the host, for messages that name a peer by its address."""
    state: State = "running"
    ended: float | None = None
    failure: Failure | None = None
    hang: str | None = None
    """What this rank found out when a collective timed out."""

    @property
    def name(self) -> str:
        """Stem of the rank's files."""
        return f"{self.host}.{self.rank}"

    def write(self, folder: Path) -> None:
        """Put the status into `folder`; readers see the old or the new one, never half.

        Raises:
            UserError: the disk is full, or the folder cannot be written.
        """
        replace_text(folder / f"{self.name}{_SUFFIX}", json.dumps(asdict(self)) + "\n")

    def finished(self, state: State, failure: Failure | None = None, hang: str | None = None) -> Status:
        """Return the status with its end."""
        return replace(self, state=state, ended=time.time(), failure=failure, hang=hang)


def starting() -> Status:
    """Return the status of this process, a rank that starts now."""
    return Status(
        host=host_name(),
        rank=process_rank(),
        world_size=process_count(),
        pid=os.getpid(),
        started=time.time(),
        addresses=tuple(_own_addresses()),
    )


def host_name() -> str:
    """Return the name under which this host's files appear: a launcher's name for it, or its own."""
    name = os.environ.get(HOST) or os.environ.get("SLURMD_NODENAME") or socket.gethostname().split(".")[0]
    return name.replace("/", "_")


def read_statuses(folder: Path) -> list[Status]:
    """Return every status in `folder`, by rank and then by start; damaged files are left out."""
    found = []
    for path in folder.glob(f"*{_SUFFIX}"):
        try:
            found.append(_from_json(json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError):
            continue
    return sorted(found, key=lambda status: (status.rank, status.started))


def newest_attempt(statuses: list[Status]) -> list[Status]:
    """Return one status a rank: those of the newest start, when a job was started again on other hosts or ranks."""
    newest: dict[int, Status] = {}
    for status in statuses:
        if status.rank not in newest or status.started >= newest[status.rank].started:
            newest[status.rank] = status
    if not newest:
        return []
    world_size = max(newest.values(), key=lambda status: status.started).world_size
    return [status for rank, status in sorted(newest.items()) if rank < world_size]


def _from_json(tree: dict[str, Any]) -> Status:
    if tree.get("failure") is not None:
        tree["failure"] = Failure(**tree["failure"])
    tree["addresses"] = tuple(tree.get("addresses", ()))
    return Status(**tree)


def _own_addresses() -> Iterator[str]:
    """Yield the addresses of this host, asking no name server that might be slow or gone."""
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                yield entry.address
