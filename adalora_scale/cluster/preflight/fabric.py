"""Measuring the fabric: every link by itself, then collectives; bounded in bytes and time.

Pairs are measured in a round-robin tournament, so that in one round every host (or rank) talks to one other only and
no two measurements share a host's link:
    within hosts    the ranks of a host among themselves, all hosts at the same time
    between hosts   host against host, H − 1 rounds for each local rank in turn: the i-th rank of one to the i-th of the
                    other, as NCCL's rails run; all pairs of hosts are measured
A link's two directions are timed apart: a slow sender and a slow receiver look different then.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

Kind = Literal["within host", "between hosts"]
FIRST_BYTES = 64 << 10
MOST_BYTES = {"gloo": 16 << 20, "nccl": 256 << 20}
TRANSFER_S = 0.05
"""How long one timed transfer or collective should last; sets its size."""
PINGS = 10
REPEATS = 3


@dataclass(frozen=True, kw_only=True)
class Link:
    """One direction of a link, as the sender timed it."""

    kind: Kind
    sender: int
    receiver: int
    bytes_per_s: float
    latency_s: float
    """Half a round trip of eight bytes."""

    def better(self, other: Link) -> Link:
        """Return the better figures of two measurements of one direction."""
        return replace(
            self,
            bytes_per_s=max(self.bytes_per_s, other.bytes_per_s),
            latency_s=min(self.latency_s, other.latency_s),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return asdict(self)


def tournament(players: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
    """Yield rounds of disjoint pairs in which each two players meet exactly once: n − 1 rounds (n if n is odd)."""
    seats: list[int | None] = [*players, *([None] if len(players) % 2 else [])]
    for _ in range(len(seats) - 1):
        half = len(seats) // 2
        pairs = zip(seats[:half], reversed(seats[half:]), strict=True)
        yield [(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None]
        seats = [seats[0], seats[-1], *seats[1:-1]]  # the first sits still, the others move on by one


def rounds(hosts: list[list[int]]) -> list[tuple[Kind, list[tuple[int, int]]]]:
    """Return all rounds for these hosts' ranks: (kind, pairs of ranks that measure at the same time)."""
    result: list[tuple[Kind, list[tuple[int, int]]]] = []
    local = [list(tournament(ranks)) for ranks in hosts]
    for number in range(max(map(len, local))):
        together = [pair for host in local if number < len(host) for pair in host[number]]
        if together:
            result.append(("within host", together))
    for index in range(min(map(len, hosts))):
        for met in tournament(range(len(hosts))):
            result.append(("between hosts", [(hosts[a][index], hosts[b][index]) for a, b in met]))
    return result


def measure_link(kind: Kind, peer: int, device: torch.device) -> Link:
    """Measure the link to `peer`, which measures its own direction in the same call."""
    own = dist.get_rank()
    begins = own < peer
    small = torch.zeros(1, dtype=torch.int64, device=device)
    trips = []
    for ping in range(PINGS + 2):  # the first ones open the connection
        began = time.perf_counter()
        _bounce(small, peer, begins=begins)
        if ping >= 2:
            trips.append(time.perf_counter() - began)
    latency = statistics.median(trips) / 2
    speed = 0.0
    for sends in (begins, not begins):
        if sends:
            speed = _send(peer, device)
        else:
            _receive(peer, device)
    return Link(kind=kind, sender=own, receiver=peer, bytes_per_s=speed, latency_s=latency)


def _bounce(small: Tensor, peer: int, *, begins: bool) -> None:
    if begins:
        dist.send(small, peer)
        dist.recv(small, peer)
    else:
        dist.recv(small, peer)
        dist.send(small, peer)
    _wait(small)


def _send(peer: int, device: torch.device) -> float:
    """Time sending to `peer`, its acknowledgement included; return the best rate in bytes a second."""
    rate = _timed_send(torch.zeros(FIRST_BYTES, dtype=torch.uint8, device=device), peer)
    rate = _timed_send(torch.zeros(FIRST_BYTES, dtype=torch.uint8, device=device), peer)
    size = _size(rate * TRANSFER_S)
    dist.send(torch.tensor([size], dtype=torch.int64, device=device), peer)
    payload = torch.zeros(size, dtype=torch.uint8, device=device)
    return max(_timed_send(payload, peer) for _ in range(REPEATS))


def _timed_send(payload: Tensor, peer: int) -> float:
    small = torch.zeros(1, dtype=torch.int64, device=payload.device)
    _wait(payload)
    began = time.perf_counter()
    dist.send(payload, peer)
    dist.recv(small, peer)
    _wait(small)
    return payload.numel() / (time.perf_counter() - began)


def _receive(peer: int, device: torch.device) -> None:
    small = torch.zeros(1, dtype=torch.int64, device=device)
    first = torch.zeros(FIRST_BYTES, dtype=torch.uint8, device=device)
    for _ in range(2):
        dist.recv(first, peer)
        dist.send(small, peer)
    size = torch.zeros(1, dtype=torch.int64, device=device)
    dist.recv(size, peer)
    payload = torch.zeros(int(size.item()), dtype=torch.uint8, device=device)
    for _ in range(REPEATS):
        dist.recv(payload, peer)
        dist.send(small, peer)


@dataclass(frozen=True, kw_only=True)
class Collective:
    """What one group of ranks reached."""

    name: Literal["all-reduce", "all-gather"]
    ranks: list[int]
    bytes: int
    """Size of the largest message: the reduced tensor, or the gathered one."""
    bus_bytes_per_s: float
    """As nccl-tests counts it, comparable between numbers of ranks and with the link's own speed."""
    latency_s: float
    """Of eight bytes a rank."""

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return asdict(self)


def measure_collectives(group: dist.ProcessGroup | None, ranks: list[int], device: torch.device) -> list[Collective]:
    """Time all-reduce and all-gather over `ranks`; all of them call this."""
    count = len(ranks)

    def all_reduce(size: int) -> Callable[[], object]:
        tensor = torch.zeros(max(size // 4, 1), dtype=torch.float32, device=device)
        return lambda: dist.all_reduce(tensor, group=group)

    def all_gather(size: int) -> Callable[[], object]:
        part = torch.zeros(max(size // (4 * count), 1), dtype=torch.float32, device=device)
        whole = torch.zeros(part.numel() * count, dtype=torch.float32, device=device)

        def gather() -> object:
            with warnings.catch_warnings():  # torch 2.13 renames it, 2.11 does not know the new name
                warnings.simplefilter("ignore", FutureWarning)
                return dist.all_gather_into_tensor(whole, part, group=group)

        return gather

    factor = (count - 1) / count
    results = []
    for name, prepare, traffic in (("all-reduce", all_reduce, 2 * factor), ("all-gather", all_gather, factor)):
        small = prepare(8 * count)
        _slowest(small, group, device)  # opens connections
        latency = statistics.median(_slowest(small, group, device) for _ in range(PINGS))
        size = FIRST_BYTES
        seconds = _slowest(prepare(size), group, device)
        while seconds < TRANSFER_S and size * 4 <= MOST_BYTES[dist.get_backend()]:
            size *= 4
            seconds = _slowest(prepare(size), group, device)
        operation = prepare(size)
        seconds = min(_slowest(operation, group, device) for _ in range(REPEATS))
        results.append(
            Collective(
                name=name,  # type: ignore[arg-type]
                ranks=ranks,
                bytes=size,
                bus_bytes_per_s=traffic * size / seconds,
                latency_s=latency,
            )
        )
    return results


def _slowest(operation: Callable[[], object], group: dist.ProcessGroup | None, device: torch.device) -> float:
    """Run `operation` once, from a common start, and return the slowest rank's seconds (the same on all)."""
    elapsed = torch.zeros(1, dtype=torch.float64, device=device)
    dist.all_reduce(elapsed, group=group)
    _wait(elapsed)
    began = time.perf_counter()
    operation()
    _wait(elapsed)
    elapsed.fill_(time.perf_counter() - began)
    dist.all_reduce(elapsed, op=dist.ReduceOp.MAX, group=group)
    return float(elapsed.item())


def _size(wanted: float) -> int:
    """Round to whole KiB between the first and the largest size."""
    return int(min(max(wanted, FIRST_BYTES), MOST_BYTES[dist.get_backend()])) // 1024 * 1024


def _wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
