"""Going over the whole fabric: collectives, every round of the tournament, and a second look at what seemed slow.

Other work on a host disturbs single measurements, for seconds at times. A link that looks slow is measured again,
alone, at growing distances, and counts as slow only if it stays so.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from adalora_scale.cluster.preflight.fabric import Collective, Kind, Link, measure_collectives, measure_link, rounds
from adalora_scale.cluster.preflight.facts import Host
from adalora_scale.cluster.preflight.findings import Finding
from adalora_scale.cluster.preflight.links import judge_collectives, judge_links, slow_pairs
from adalora_scale.cluster.preflight.thresholds import Thresholds
from adalora_scale.cluster.ranks import Board, RanksSilent, process_group
from adalora_scale.messages import cause

_PAUSES_S = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Before each second look: a disturbance that outlasts one look seldom outlasts all of them."""
_MOST_PAIRS_AGAIN = 64


@dataclass
class Measured:
    """What was measured; complete on rank 0 alone."""

    backend: str = "gloo"
    links: list[Link] = field(default_factory=list)
    collectives: list[Collective] = field(default_factory=list)
    troubles: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    """(rank, what it was doing and what went wrong)"""
    left_out: str = ""


def measure_fabric(board: Board, hosts: list[Host], *, thresholds: Thresholds, time_limit_s: float) -> Measured | None:
    """Join a process group and measure; returns the figures on rank 0. All ranks call this.

    A failure to join or to transfer is among the figures: it ends the measuring, not the checks.
    """
    sweep = _Sweep(board, hosts, thresholds, time_limit_s)
    trouble: dict[str, Any] | None = None
    try:
        with process_group(board.place, board.store, timeout_s=board.timeout_s) as device:
            sweep.run(device)
    except (RuntimeError, ValueError) as error:  # torch's own errors are RuntimeErrors
        if isinstance(error, RanksSilent):
            raise
        trouble = {"doing": sweep.doing, "step": sweep.step, "error": cause(error, 300)}
    own = {
        "backend": sweep.backend,
        "links": [link.as_dict() for link in sweep.best.values()],
        "collectives": [result.as_dict() for result in sweep.collectives],
        "trouble": trouble,
    }
    said = board.collect("fabric", own)
    if said is None:
        return None
    groups = {(result["name"], *result["ranks"]): Collective(**result) for one in said for result in one["collectives"]}
    return Measured(
        backend=sweep.backend,
        links=[Link(**link) for one in said for link in one["links"]],
        collectives=list(groups.values()),
        troubles=[(rank, one["trouble"]) for rank, one in enumerate(said) if one["trouble"] is not None],
        left_out=sweep.left_out,
    )


def judge_fabric(measured: Measured, hosts: list[Host], thresholds: Thresholds) -> list[Finding]:
    """Turn the figures into findings; of what went wrong only the first, because the rest followed from it."""
    limits = thresholds.fabric(measured.backend)
    findings = judge_links(measured.links, hosts, limits) + judge_collectives(measured.collectives, hosts, limits)
    names = {rank: host.name for host in hosts for rank in host.ranks}
    first = min((trouble["step"] for _, trouble in measured.troubles), default=0)
    for rank, trouble in measured.troubles:
        if trouble["step"] == first:
            where, text = f"rank {rank} on {names[rank]}", f"{trouble['doing']}: {trouble['error']}"
            findings.append(Finding(check="communication", where=where, status="FAIL", text=text))
    if measured.left_out:
        findings.append(Finding(check="links", where="job", status="note", text=measured.left_out))
    return findings


class _Sweep:
    """One rank's way through the measurements; `doing` and `step` say how far it came."""

    def __init__(self, board: Board, hosts: list[Host], thresholds: Thresholds, time_limit_s: float) -> None:
        self.board, self.hosts, self.thresholds = board, hosts, thresholds
        self.time_limit_s = time_limit_s
        self.began = time.monotonic()
        self.doing, self.step = "joining the process group", 0
        self.backend = "gloo"
        self.best: dict[int, Link] = {}
        """The best of what was measured towards every peer."""
        self.collectives: list[Collective] = []
        self.left_out = ""

    def run(self, device: torch.device) -> None:
        """Measure everything, as far as the time goes."""
        self.backend = dist.get_backend()
        self._measure_collectives(device)
        plan = rounds([host.ranks for host in self.hosts])
        for number, (kind, pairs) in enumerate(plan):
            if not self._go_on():
                self.left_out = (
                    f"the time limit of {self.time_limit_s:g} s left out {len(plan) - number} of {len(plan)} rounds"
                )
                return
            self._measure_pairs(kind, pairs, device)
        for look, pause in enumerate(_PAUSES_S):
            said = self.board.collect(f"look {look}", [link.as_dict() for link in self.best.values()])
            again: list[tuple[Kind, int, int]] = []
            if said is not None:
                links = [Link(**link) for one in said for link in one]
                again = slow_pairs(links, self.thresholds.fabric(self.backend))[:_MOST_PAIRS_AGAIN]
                if again:
                    time.sleep(pause)  # the others wait for what is announced
            again = self.board.announce(f"again {look}", again)
            if not again:
                return
            for kind, a, b in again:
                if not self._go_on():
                    return
                self._measure_pairs(kind, [(a, b)], device)

    def _measure_collectives(self, device: torch.device) -> None:
        self.doing = "collectives"
        own = self.board.place.rank
        everyone = list(range(self.board.place.world_size))
        if len(self.hosts) > 1:
            for host in self.hosts:
                group = dist.new_group(host.ranks)
                if own in host.ranks and len(host.ranks) > 1:
                    self.collectives += measure_collectives(group, host.ranks, device)
        dist.barrier()
        self.collectives += measure_collectives(None, everyone, device)

    def _measure_pairs(self, kind: Kind, pairs: list[tuple[int, int]], device: torch.device) -> None:
        own = self.board.place.rank
        dist.barrier()
        for a, b in pairs:
            if own in (a, b):
                peer = b if own == a else a
                self.doing = f"the link {kind} with rank {peer}"
                link = measure_link(kind, peer, device)
                self.best[peer] = link.better(self.best.get(peer, link))

    def _go_on(self) -> bool:
        """Let rank 0 decide for all whether there is time for another measurement."""
        self.step += 1
        return bool(self.board.announce(f"go {self.step}", time.monotonic() - self.began < self.time_limit_s))
