"""The part of preflight that costs less than a second: launch/train.py runs it before anything else.

It asks what would end in a hang or a wrong result: different versions, an output_dir that is another folder on another
host, ranks without a GPU beside ranks with one. Limits that are merely low are notes here. Ranks meet at the store that
torch's process group uses afterwards; there is no collective.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from adalora_scale.cluster.place import launched
from adalora_scale.cluster.preflight.facts import (
    Facts,
    check_devices,
    check_limits,
    compare_versions,
    hosts_of,
    own_facts,
)
from adalora_scale.cluster.preflight.findings import Finding, failed
from adalora_scale.cluster.preflight.storage import UNWRITABLE, check_shared_folder
from adalora_scale.cluster.preflight.thresholds import load_thresholds
from adalora_scale.cluster.ranks import Board, RanksSilent
from adalora_scale.messages import say

if TYPE_CHECKING:
    import torch.distributed as dist

EXIT_CODE = 1
_PATIENCE_S = 300.0  # hosts import torch from cold disks at different speeds


class Unhealthy(RuntimeError):
    """The quick part failed; rank 0 has said why, in one line."""


def quick_check(output_dir: str) -> dist.Store | None:
    """Compare the ranks that a launcher started, before they join a process group.

    Args:
        output_dir: the run's folder, which all ranks must see; made if it is not there.

    Returns:
        The store the ranks met at, to be kept until training ends (None for one process): under deepspeed and srun
        rank 0 serves it, and the process group meets there too.

    Raises:
        Unhealthy: on every rank, once rank 0 has printed one line.
    """
    place = launched()
    if place is None or place.world_size == 1:
        return None
    board = Board(place, timeout_s=_PATIENCE_S)
    findings: list[Finding] = []
    try:
        everyone = board.collect("facts", own_facts(place).as_dict())
        facts = [Facts(**said) for said in everyone] if everyone is not None else []
        board.announce("facts read")
        hosts = hosts_of(facts)
        findings += check_shared_folder(board, Path(output_dir), hosts)
        if facts:
            findings += compare_versions(facts, hosts)
            findings += check_devices(facts, hosts)
            low = failed(check_limits(facts, hosts, load_thresholds()))
            findings += [replace(finding, status="note") for finding in low]
    except RanksSilent as silence:
        if place.rank == 0:
            findings.append(Finding(check="ranks", where="job", status="FAIL", text=str(silence)))
    # A folder that rank 0 cannot write is a mistake in the config; training names the key, with exit code 2.
    problems = [finding for finding in failed(findings) if finding.check != UNWRITABLE]
    if place.rank == 0:
        _say(findings, problems)
    healthy = bool(board.announce("verdict", not problems))
    if not healthy:
        board.leave()
        raise Unhealthy
    return board.store


def _say(findings: list[Finding], problems: list[Finding]) -> None:
    for finding in findings:
        if finding.status == "note" and finding.check in ("shared memory", "open files"):
            say(f"note: {finding.check} on {finding.where}: {finding.text}", to=sys.stderr)
    if problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more; adalora-scale preflight shows all)" if len(problems) > 1 else ""
        line = f"error: preflight: {first.check}: {first.where}: {first.text}{more}"
        say(line, to=sys.stderr)
