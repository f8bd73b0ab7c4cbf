"""What a rank says of itself, and comparing what all ranks say."""

from __future__ import annotations

import hashlib
import os
import re
import resource
import shutil
import socket
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from adalora_scale.cluster.place import Place
from adalora_scale.cluster.preflight.findings import Finding
from adalora_scale.cluster.preflight.thresholds import Thresholds
from adalora_scale.cluster.ranks import ranks_text
from adalora_scale.installed import ABSENT, version_of
from adalora_scale.training.records import versions

_ALSO = ("peft", "numpy", "safetensors", "tokenizers", "triton")
COMMUNICATION = ("torch", "cuda", "nccl")
"""Where these differ, a collective may hang instead of failing."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """One rank's own account; plain values, so that it travels as JSON."""

    rank: int
    local_rank: int
    local_world_size: int
    hostname: str
    address: str
    """The local address that leads to rank 0."""
    machine: str
    """Tells hosts apart that share a name: boot id and network namespace."""
    versions: dict[str, str]
    gpus: int
    """GPUs this process sees."""
    shared_memory_bytes: int | None
    """Size of /dev/shm; None where there is none."""
    open_files: int
    """Soft limit."""
    open_files_hard: int

    def as_dict(self) -> dict[str, Any]:
        """Return what travels."""
        return asdict(self)


@dataclass(frozen=True)
class Host:
    """The ranks on one host, in order."""

    name: str
    ranks: list[int]


def own_facts(place: Place) -> Facts:
    """Return this process's facts; no other process is asked, and no GPU is initialised."""
    soft, hard = (
        2**31 if limit == resource.RLIM_INFINITY else limit for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    return Facts(
        rank=place.rank,
        local_rank=place.local_rank,
        local_world_size=place.local_world_size,
        hostname=socket.gethostname(),
        address=_address_towards(os.environ.get("MASTER_ADDR", "127.0.0.1")),
        machine=_machine(),
        versions=all_versions(),
        gpus=torch.cuda.device_count(),
        shared_memory_bytes=shutil.disk_usage("/dev/shm").total if os.path.isdir("/dev/shm") else None,
        open_files=soft,
        open_files_hard=hard,
    )


def all_versions() -> dict[str, str]:
    """Return the versions that must be equal on all ranks, this package's source files included."""
    found = versions()
    found |= {package: version_of(package) for package in _ALSO}
    found["adalora-scale's files"] = _source_digest()
    if torch.version.cuda:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call, unused-ignore]
    driver = Path("/proc/driver/nvidia/version")
    if driver.exists() and (match := re.search(r"\b(\d{3}\.[\d.]+)\b", driver.read_text())):
        found["NVIDIA driver"] = match[1]
    return found


def hosts_of(everyone: list[Facts]) -> list[Host]:
    """Group the ranks by host; a host's name carries its address where another has the same name."""
    groups: dict[tuple[str, str], list[Facts]] = {}
    for facts in everyone:
        groups.setdefault((facts.hostname, facts.machine), []).append(facts)
    names = Counter(hostname for hostname, _ in groups)
    hosts = []
    for (hostname, _), members in groups.items():
        name = hostname if names[hostname] == 1 else f"{hostname} ({members[0].address})"
        hosts.append(Host(name, [facts.rank for facts in members]))
    return hosts


def compare_versions(everyone: list[Facts], hosts: list[Host]) -> list[Finding]:
    """Name every rank whose versions differ from most ranks' (rank 0's where as many have another)."""
    findings = []
    names = {rank: host.name for host in hosts for rank in host.ranks}
    for package in sorted({package for facts in everyone for package in facts.versions}):
        said = [facts.versions.get(package, ABSENT) for facts in everyone]
        usual = Counter(said).most_common(1)[0][0]  # the first of equals is rank 0's
        odd: dict[str, list[int]] = {}
        for facts, version in zip(everyone, said, strict=True):
            if version != usual:
                odd.setdefault(version, []).append(facts.rank)
        for version, ranks in odd.items():
            where = f"{ranks_text(ranks)} on {', '.join(sorted({names[rank] for rank in ranks}))}"
            text = f"{package} {version}, the other {len(everyone) - len(ranks)} ranks have {usual}"
            findings.append(Finding(check="versions", where=where, status="FAIL", text=text))
    if not findings:
        shown = ", ".join(f"{name} {everyone[0].versions[name]}" for name in ("torch", "transformers", "deepspeed"))
        text = f"equal: {shown} and {len(everyone[0].versions) - 3} more"
        findings.append(Finding(check="versions", where=_all(everyone), status="ok", text=text))
    return findings


def may_communicate(everyone: list[Facts]) -> bool:
    """Whether collectives between these ranks can be tried."""
    return all(len({facts.versions.get(name) for facts in everyone}) == 1 for name in COMMUNICATION)


def check_devices(everyone: list[Facts], hosts: list[Host]) -> list[Finding]:
    """See that every rank has a GPU of its own, or none has one."""
    by_rank = {facts.rank: facts for facts in everyone}
    lacking, counts = [], {}
    for host in hosts:
        seen = {by_rank[rank].gpus for rank in host.ranks}
        counts[host.name] = (len(host.ranks), max(seen))
        if max(seen) < len(host.ranks):
            lacking.append(host)
    if len(lacking) == len(hosts) and all(gpus == 0 for _, gpus in counts.values()):
        return [Finding(check="devices", where=_all(everyone), status="note", text="no GPU: gloo on the CPU is used")]
    findings = [
        Finding(
            check="devices",
            where=host.name,
            status="FAIL",
            text=f"{counts[host.name][0]} ranks but {counts[host.name][1]} GPUs; start one rank for each GPU",
        )
        for host in lacking
    ]
    if len({count for count, _ in counts.values()}) > 1:
        text = "unequal ranks a host: " + ", ".join(f"{name} {ranks}" for name, (ranks, _) in counts.items())
        findings.append(Finding(check="devices", where=_all(everyone), status="note", text=text))
    return findings or [Finding(check="devices", where=_all(everyone), status="ok", text="a GPU for every rank")]


def check_limits(everyone: list[Facts], hosts: list[Host], limits: Thresholds) -> list[Finding]:
    """Hold shared memory and the open-file limit of every host against the limits."""
    return [
        *_limit(
            "shared memory",
            {facts.rank: (facts.shared_memory_bytes or 0) / 2**30 for facts in everyone},
            limits.shared_memory_min_gib,
            "GiB in /dev/shm; give containers --shm-size or a memory volume",
            hosts,
        ),
        *_limit(
            "open files",
            {facts.rank: facts.open_files for facts in everyone},
            limits.open_files(len(everyone)),
            "files a process may open; raise it with ulimit -n",
            hosts,
        ),
    ]


def _limit(check: str, values: dict[int, float], limit: float, what: str, hosts: Iterable[Host]) -> list[Finding]:
    low = [(host, min(values[rank] for rank in host.ranks)) for host in hosts]
    common = {"check": check, "limit": float(limit), "unit": what.split(";")[0]}
    findings = [
        Finding(
            where=host.name,
            status="FAIL",
            value=float(value),
            text=f"{value:,.6g} {what} (at least {limit:,.6g} are needed)",
            **common,  # type: ignore[arg-type]
        )
        for host, value in low
        if value < limit
    ]
    least = min(value for _, value in low)
    text = f"at least {least:,.6g} {what.split(';')[0]}"
    return findings or [Finding(where="all hosts", status="ok", value=float(least), text=text, **common)]  # type: ignore[arg-type]


def _all(everyone: list[Facts]) -> str:
    return f"all {len(everyone)} ranks" if len(everyone) > 1 else "this process"


def _address_towards(host: str) -> str:
    """Return the local address of the route to `host`; connecting a datagram socket sends nothing."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return "no route"


def _machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/net")
    parts = [boot.read_text().strip() if boot.exists() else ""]
    parts.append(str(namespace.stat().st_ino) if namespace.exists() else "")
    return "/".join(parts)


def _source_digest() -> str:
    """Return a digest of this package's files: an editable checkout keeps its version through every change."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
