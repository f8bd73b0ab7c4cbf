"""`adalora-scale preflight`: run the checks on the ranks at hand, print the table or JSON, return the exit code."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adalora_scale.cluster.place import Place, launched
from adalora_scale.cluster.preflight import storage
from adalora_scale.cluster.preflight.facts import (
    Facts,
    Host,
    check_devices,
    check_limits,
    compare_versions,
    hosts_of,
    may_communicate,
    own_facts,
)
from adalora_scale.cluster.preflight.findings import Finding, failed, table
from adalora_scale.cluster.preflight.gpu import gpu_health, judge_gpu
from adalora_scale.cluster.preflight.sweep import Measured, judge_fabric, measure_fabric
from adalora_scale.cluster.preflight.thresholds import Thresholds, load_thresholds
from adalora_scale.cluster.ranks import Board, RanksSilent
from adalora_scale.config import load_config
from adalora_scale.errors import UserError
from adalora_scale.messages import say, say_json, say_text

_ALONE = Place(rank=0, world_size=1, local_rank=0, local_world_size=1)


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    model_path: Path | None
    output_dir: Path | None
    thresholds: Thresholds
    time_limit_s: float
    """No further link is measured after this many seconds."""
    timeout_s: float
    """How long to wait for a rank, or for a transfer."""


@dataclass
class Outcome:
    """What rank 0 knows in the end."""

    findings: list[Finding] = field(default_factory=list)
    facts: list[Facts] = field(default_factory=list)
    hosts: list[Host] = field(default_factory=list)
    measured: Measured | None = None


def run(arguments: argparse.Namespace) -> int:
    """Run the checks; return 1 if one failed.

    Raises:
        UserError: the options, the config or the thresholds cannot be used.
    """
    request = _request(arguments)
    place = launched()
    if place is None or place.world_size == 1:
        return 0 if _say(_check_alone(request), as_json=arguments.json) else 1
    board = Board(place, timeout_s=request.timeout_s)
    outcome = _check_ranks(board, request)
    passed = _say(outcome, as_json=arguments.json) if place.rank == 0 else None
    try:
        passed = board.announce("verdict", passed)  # every host's launcher shall fail, not rank 0's alone
    except RanksSilent:
        passed = False
    board.leave()
    return 0 if passed else 1


def _say(outcome: Outcome, *, as_json: bool) -> bool:
    """Print the table or the JSON object; return whether nothing failed."""
    problems = failed(outcome.findings)
    if as_json:
        say_json(_as_json(outcome, passed=not problems))
    else:
        say(_headline(outcome))
        say_text(table(outcome.findings))
        say(f"FAILED: {len(problems)} of {len(outcome.findings)} lines" if problems else "passed")
    return not problems


def _request(arguments: argparse.Namespace) -> Request:
    if arguments.overrides and not arguments.config:
        raise UserError(f"'{arguments.overrides[0]}' replaces a value of a config; pass --config FILE too.")
    for option, value in (("--time-limit", arguments.time_limit), ("--timeout", arguments.timeout)):
        if not 0 < value < 86400:
            raise UserError(f"{option} is {value:g}; it must be a number of seconds above 0.")
    model_path, output_dir = arguments.model_path, arguments.output_dir
    if arguments.config:
        config = load_config(arguments.config, arguments.overrides)
        output_dir = output_dir or Path(config.training["output_dir"])
        name = config.model.model_name_or_path
        # A path must be there on every host; anything else may be the id of a hub's model.
        is_path = name.startswith(("/", ".", "~")) or Path(name).is_dir()
        model_path = model_path or (Path(name).expanduser() if is_path else None)
    return Request(
        model_path=model_path,
        output_dir=output_dir,
        thresholds=load_thresholds(arguments.thresholds),
        time_limit_s=arguments.time_limit,
        timeout_s=arguments.timeout,
    )


def _check_alone(request: Request) -> Outcome:
    """Check what one process can see."""
    facts = own_facts(_ALONE)
    outcome = Outcome(facts=[facts], hosts=[Host(facts.hostname, [0])])
    outcome.findings += compare_versions(outcome.facts, outcome.hosts)
    outcome.findings += check_limits(outcome.facts, outcome.hosts, request.thresholds)
    _judge_local(outcome, [_measure_local(_ALONE, request)], request)
    why = "one process; start one on every GPU of every host with torchrun, deepspeed or srun"
    outcome.findings.append(Finding(check="links", where="job", status="skipped", text=why))
    return outcome


def _check_ranks(board: Board, request: Request) -> Outcome:
    """Run all checks on the ranks of a launcher; only rank 0's outcome is complete."""
    place, outcome = board.place, Outcome()
    try:
        everyone = board.collect("facts", own_facts(place).as_dict())
        communicate = False
        if everyone is not None:
            outcome.facts = [Facts(**said) for said in everyone]
            outcome.hosts = hosts_of(outcome.facts)
            outcome.findings += compare_versions(outcome.facts, outcome.hosts)
            outcome.findings += check_devices(outcome.facts, outcome.hosts)
            outcome.findings += check_limits(outcome.facts, outcome.hosts, request.thresholds)
            communicate = may_communicate(outcome.facts)
        hosts = [Host(*host) for host in board.announce("hosts", [(host.name, host.ranks) for host in outcome.hosts])]
        if request.output_dir is not None:
            outcome.findings += storage.check_shared_folder(board, request.output_dir, hosts)
        said = board.collect("local", _measure_local(place, request))
        if said is not None:
            _judge_local(outcome, said, request)
        if board.announce("communicate", communicate):
            outcome.measured = measure_fabric(
                board, hosts, thresholds=request.thresholds, time_limit_s=request.time_limit_s
            )
            if outcome.measured is not None:
                outcome.findings += judge_fabric(outcome.measured, outcome.hosts, request.thresholds)
        else:
            why = "torch, CUDA or NCCL differ between ranks: a collective could hang"
            outcome.findings.append(Finding(check="links", where="job", status="skipped", text=why))
    except RanksSilent as silence:
        if place.rank == 0:
            outcome.findings.append(Finding(check="ranks", where="job", status="FAIL", text=str(silence)))
    return outcome


def _measure_local(place: Place, request: Request) -> dict[str, Any]:
    """Measure disks (one rank a host) and ask NVML."""
    found: dict[str, Any] = {"gpu": gpu_health(place.local_rank)}
    if place.local_rank == 0:
        if request.model_path is not None:
            found["disk read"] = storage.read_throughput(request.model_path)
        if request.output_dir is not None:
            found["disk write"] = storage.write_throughput(request.output_dir)
    return found


def _judge_local(outcome: Outcome, said: list[dict[str, Any]], request: Request) -> None:
    limits = request.thresholds
    names = {rank: host.name for host in outcome.hosts for rank in host.ranks}
    for rank, found in enumerate(said):
        for check, least in (("disk read", limits.disk_read_min_mb_s), ("disk write", limits.disk_write_min_mb_s)):
            if check in found:
                outcome.findings.append(storage.judge_throughput(check, names[rank], found[check], least))
    reasons = {found["gpu"].get("skipped") for found in said}
    if len(reasons) == 1 and (reason := reasons.pop()) is not None:
        outcome.findings.append(Finding(check="GPU health", where="all ranks", status="skipped", text=reason))
    else:
        for rank, found in enumerate(said):
            outcome.findings += judge_gpu(rank, names[rank], found["gpu"], limits)
    for option, key in (("--model-path", "disk read"), ("--output-dir", "disk write")):
        if not any(key in found for found in said):
            text = f"no local folder is known (a hub id is none); pass {option}"
            outcome.findings.append(Finding(check=key, where="all hosts", status="skipped", text=text))


def _headline(outcome: Outcome) -> str:
    ranks, hosts = len(outcome.facts), len(outcome.hosts)
    names = ", ".join(host.name for host in outcome.hosts)
    counted = f"{ranks} rank{'s' * (ranks != 1)} on {hosts} host{'s' * (hosts != 1)}"
    return f"{counted} ({names}); {outcome.measured.backend if outcome.measured else 'no links measured'}"


def _as_json(outcome: Outcome, *, passed: bool) -> dict[str, Any]:
    return {
        "passed": passed,
        "world_size": len(outcome.facts),
        "backend": outcome.measured.backend if outcome.measured else None,
        "hosts": [{"name": host.name, "ranks": host.ranks} for host in outcome.hosts],
        "versions": outcome.facts[0].versions if outcome.facts else {},
        "findings": [finding.as_dict() for finding in outcome.findings],
        "links": [link.as_dict() for link in (outcome.measured.links if outcome.measured else [])],
        "collectives": [result.as_dict() for result in (outcome.measured.collectives if outcome.measured else [])],
    }
