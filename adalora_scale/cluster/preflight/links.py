"""Which link or host is slow, from what every sender timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adalora_scale.cluster.preflight.fabric import Collective, Kind, Link
from adalora_scale.cluster.preflight.facts import Host
from adalora_scale.cluster.preflight.findings import Finding, Status
from adalora_scale.cluster.preflight.thresholds import FabricLimits


@dataclass(frozen=True)
class _Judged:
    """One figure of all links of one kind, with its limit and the links on the wrong side of it."""

    check: str
    figure: str
    unit: str
    links: list[Link]
    values: list[float]
    limit: float
    good: float
    """What the better quarter of the links reaches at least."""
    slow: list[Link]
    worst: Callable[[list[float]], float]


def judge_links(links: list[Link], hosts: list[Host], limits: FabricLimits) -> list[Finding]:
    """Hold every direction of every link against the limits and against its like, and name what the slow ones share."""
    return [finding for judged in _judge(links, limits) for finding in _findings(judged, hosts)]


def slow_pairs(links: list[Link], limits: FabricLimits) -> list[tuple[Kind, int, int]]:
    """Return the pairs of ranks with a slow direction, each once."""
    slow = [link for judged in _judge(links, limits) for link in judged.slow]
    return sorted({(link.kind, *sorted((link.sender, link.receiver))) for link in slow})  # type: ignore[misc]


def _judge(links: list[Link], limits: FabricLimits) -> Iterator[_Judged]:
    """Compare every link with the edge of the better quarter of its kind.

    Not with the median: one slow host among three makes two thirds of all links slow, and the median with them.
    """
    for kind in ("within host", "between hosts"):
        of_kind = [link for link in links if link.kind == kind]
        if not of_kind:
            continue
        name, check = kind.replace(" ", "_"), f"link {kind}"
        speeds = [link.bytes_per_s / 1e9 for link in of_kind]
        good = sorted(speeds)[math.ceil(0.75 * (len(speeds) - 1))]
        least = max(getattr(limits, f"{name}_min_gb_s"), limits.link_min_share * good)
        slow = [link for link, speed in zip(of_kind, speeds, strict=True) if speed < least]
        yield _Judged(check, "bandwidth", "GB/s", of_kind, speeds, least, good, slow, min)
        times = [link.latency_s * 1e6 for link in of_kind]
        good = sorted(times)[math.floor(0.25 * (len(times) - 1))]
        most = max(limits.latency_max_times * good, good + limits.latency_noise_us)
        most = min(getattr(limits, f"{name}_max_us"), most)
        slow = [link for link, time in zip(of_kind, times, strict=True) if time > most]
        yield _Judged(check, "latency", "µs", of_kind, times, most, good, slow, max)


def _findings(judged: _Judged, hosts: list[Host]) -> list[Finding]:
    """Turn one figure of one kind of link into findings."""
    unit, values = judged.unit, judged.values

    def finding(where: str, status: Status, text: str, value: float) -> Finding:
        return Finding(
            check=judged.check, where=where, status=status, text=text, value=value, limit=judged.limit, unit=unit
        )

    if not judged.slow:
        text = f"{judged.figure} {min(values):,.3g} to {max(values):,.3g} {unit} in {len(values)} directions"
        return [finding("all links", "ok", text, judged.worst(values))]
    names = {rank: host.name for host in hosts for rank in host.ranks}
    value_of = {id(link): value for link, value in zip(judged.links, values, strict=True)}
    findings = []
    for where, what, members in _culprits(judged.links, judged.slow, names):
        value = judged.worst([value_of[id(link)] for link in members])
        rest = f"(limit {judged.limit:,.3g}, good links here {judged.good:,.3g})"
        findings.append(finding(where, "FAIL", f"{judged.figure}, {what}: {value:,.3g} {unit} {rest}", value))
    return findings


def _culprits(links: list[Link], slow: list[Link], names: dict[int, str]) -> list[tuple[str, str, list[Link]]]:
    """Group the slow directions: by a host all of whose links (to two others or more) are slow, the rest one by one.

    A host is named for what no other explains: links to two hosts or more that are slow beside those of a host named
    before it. One such link can be its other end's fault as well, and is named as a link.
    """
    left = list(slow)
    found = []
    between = links[0].kind == "between hosts"
    place = (lambda rank: names[rank]) if between else (lambda rank: f"rank {rank} on {names[rank]}")
    ends = sorted({place(rank) for link in links for rank in (link.sender, link.receiver)})
    sides: list[tuple[str, Callable[[Link, str], bool]]] = [
        ("sends and receives slowly", lambda link, end: end in (place(link.sender), place(link.receiver))),
        ("sends slowly", lambda link, end: end == place(link.sender)),
        ("receives slowly", lambda link, end: end == place(link.receiver)),
    ]
    for what, belongs in sides:
        for end in ends:
            own = [link for link in links if belongs(link, end)]
            unexplained = {place(rank) for link in own if link in left for rank in (link.sender, link.receiver)} - {end}
            if len(unexplained) >= 2 and all(link in slow for link in own):
                found.append((end, what, own))
                left = [link for link in left if link not in own]
    for link in left:
        found.append((f"{place(link.sender)} → {place(link.receiver)}", "in this direction", [link]))
    return found


def judge_collectives(results: list[Collective], hosts: list[Host], limits: FabricLimits) -> list[Finding]:
    """Hold the bus bandwidth of every group's collectives against the limits."""
    findings = []
    for result in results:
        inside = [host.name for host in hosts if set(result.ranks) <= set(host.ranks)]
        where = inside[0] if inside else f"{len(hosts)} hosts, {len(result.ranks)} ranks"
        limit = limits.all_reduce_min_gb_s if result.name == "all-reduce" else limits.all_gather_min_gb_s
        speed = result.bus_bytes_per_s / 1e9
        text = (
            f"{speed:,.4g} GB/s of bus bandwidth at {result.bytes / 2**20:,.4g} MiB, {result.latency_s * 1e6:,.0f} µs "
            f"at 8 bytes a rank"
        )
        slow = speed < limit
        findings.append(
            Finding(
                check=result.name,
                where=where,
                status="FAIL" if slow else "ok",
                text=f"{text} (at least {limit:,.4g})" if slow else text,
                value=speed,
                limit=limit,
                unit="GB/s",
            )
        )
    return findings
