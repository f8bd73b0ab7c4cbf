"""Why a run failed: host, rank and first exception, out of the log folder of all ranks.

    python -m adalora_scale.cluster.evidence.failures logs/JOB

One failure brings all ranks down, and most of them only report that a peer was gone. The reason is looked for in this
order: the earliest exception that is a rank's own; a process that a signal killed; a host whose ranks all fell silent;
a rank that did not come to a collective; and only then the earliest report of a missing peer.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from adalora_scale.cluster.evidence import flight_recorder
from adalora_scale.cluster.evidence.hang import STACKS_SUFFIX
from adalora_scale.cluster.evidence.launcher_log import LauncherNews, read_launcher_logs
from adalora_scale.cluster.evidence.status import Status, newest_attempt, read_statuses
from adalora_scale.errors import UserError, run_reporting_errors
from adalora_scale.messages import printable, say_json, say_text


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What is known about the end of a run."""

    state: str
    """`done`, `checkpointed`, `running` or `failed`."""
    reason: str | None = None
    """One line: host, rank, first exception."""
    host: str | None = None
    rank: int | None = None
    details: list[str] = field(default_factory=list)
    """Lines that support the reason, and the log to read."""


_CLOCKS_DIFFER_S = 60.0
"""What the clocks of hosts may differ by."""


def summarise(folder: Path, since: float | None = None) -> Summary:
    """Read a run's log folder and find the reason of its failure.

    Args:
        folder: the logs.
        since: when this start began, seconds since the epoch; what is older belongs to an earlier run.

    Raises:
        UserError: the folder holds no status of any rank.
    """
    everything = [s for s in read_statuses(folder) if since is None or s.started > since - _CLOCKS_DIFFER_S]
    statuses = newest_attempt(everything)
    if not statuses:
        raise UserError(
            f"{folder} holds no rank's status{' of this start' if since else ''}: no rank started under "
            f"launch/train.py with ADALORA_LOG_DIR={folder}; see what the launcher said in *.launcher.log."
        )
    news = read_launcher_logs(folder)
    states = {status.state for status in statuses}
    if states == {"done"} and len(statuses) == statuses[0].world_size:
        return Summary(state="done", details=[f"all {len(statuses)} ranks are done"])
    if "failed" not in states and "checkpointed" in states:
        return Summary(
            state="checkpointed",
            details=["it ended on request; start it again to go on"],
        )
    if states == {"running"} and not (news.signals or news.lost_hosts or news.ended_by_launcher):
        return Summary(state="running", details=[f"{len(statuses)} ranks have not reported an end"])
    return (
        _own_exception(folder, statuses)
        or _killed(folder, statuses, news)
        or _silent_host(folder, statuses, news)
        or _late(folder, statuses)
        or _peer_trouble(folder, statuses, news)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Print the summary of a log folder; exit code 1 if the run failed."""
    parser = argparse.ArgumentParser(prog="failures", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path, help="the run's log folder")
    parser.add_argument("--since", type=Path, metavar="FILE", help="leave out ranks that started before FILE was made")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)

    def run() -> int:
        summary = summarise(arguments.folder, arguments.since.stat().st_mtime if arguments.since else None)
        if arguments.json:
            say_json(asdict(summary))
        else:
            say_text(render(summary))
        return int(summary.state == "failed")

    return run_reporting_errors(run)


def render(summary: Summary) -> str:
    """Return the summary as a few lines for a person."""
    head = f"first failure: {summary.reason}" if summary.reason else f"run: {summary.state}"
    return "\n".join([printable(head), *(f"  {printable(line)}" for line in summary.details)])


def _own_exception(folder: Path, statuses: list[Status]) -> Summary | None:
    own = [status for status in statuses if status.failure and not status.failure.from_peers]
    if not own:
        return None
    first = min(own, key=lambda status: status.ended or 0)
    return _failed(folder, first, _describe(first), _others(statuses, first))


def _killed(folder: Path, statuses: list[Status], news: LauncherNews) -> Summary | None:
    for status in statuses:
        name = news.signals.get((status.host, status.pid))
        if status.state == "running" and name:
            why = " (out of memory? see the kernel's log of the host)" if name == "SIGKILL" else ""
            return _failed(folder, status, f"killed by {name}{why}", _others(statuses, status))
    return None


def _silent_host(folder: Path, statuses: list[Status], news: LauncherNews) -> Summary | None:
    """Find a host all of whose ranks ended without a word: no launcher ended them, none answered when asked."""
    by_host: dict[str, list[Status]] = defaultdict(list)
    for status in statuses:
        by_host[status.host].append(status)
    silent = {
        host: ranks
        for host, ranks in by_host.items()
        if all(
            rank.state == "running"
            and (host, rank.pid) not in news.ended_by_launcher
            and not (folder / f"{rank.name}{STACKS_SUFFIX}").exists()
            for rank in ranks
        )
    }
    lost = [host for host in silent if host in news.lost_hosts] or list(silent)
    if not lost or len(lost) == len(by_host):
        return None
    ranks = silent[lost[0]]
    listed = ", ".join(str(rank.rank) for rank in ranks)
    reason = f"ended without a word (with its rank{'s' * (len(ranks) > 1)} {listed}): killed, or its host is gone"
    details = [f"host {host} fell silent too" for host in lost[1:]]
    if lost[0] in news.lost_hosts:
        details.append(news.lost_hosts[lost[0]])
    return _failed(folder, ranks[0], reason, [*details, *_others(statuses, ranks[0])], host_only=True)


def _late(folder: Path, statuses: list[Status]) -> Summary | None:
    """Let the flight records say which rank did not come."""
    names = {status.rank: f"rank {status.rank} on {status.host}" for status in statuses}
    found = flight_recorder.explain(flight_recorder.read_records(folder), statuses[0].world_size, names)
    if found is None:
        return None
    late = next((status for status in statuses if status.rank in found.late), None)
    reported = [status for status in statuses if status.failure and status.failure.from_peers]
    details = [_named(status, _describe(status)) for status in reported[:1]]
    stacks = sorted(path.name for path in folder.glob(f"*{STACKS_SUFFIX}"))
    if stacks:
        details.append(
            f"where each rank was: {folder}/{stacks[0]}" + (f" and {len(stacks) - 1} more" * (len(stacks) > 1))
        )
    host, rank = (late.host, late.rank) if late else (None, None)
    return Summary(state="failed", reason=found.text, host=host, rank=rank, details=details)


def _peer_trouble(folder: Path, statuses: list[Status], news: LauncherNews) -> Summary:
    reported = [status for status in statuses if status.failure]
    if reported:
        first = min(reported, key=lambda status: status.ended or 0)
        return _failed(folder, first, _describe(first), _others(statuses, first))
    first = next((s for s in statuses if (s.host, s.pid) not in news.ended_by_launcher), statuses[0])
    return _failed(folder, first, "ended without a word", _others(statuses, first))


def _failed(folder: Path, status: Status, reason: str, details: list[str], *, host_only: bool = False) -> Summary:
    subject = f"host {status.host} {reason}" if host_only else _named(status, reason)
    log = folder / f"{status.name}.log"
    return Summary(
        state="failed", reason=subject, host=status.host, rank=status.rank, details=[*details, f"its log: {log}"]
    )


def _named(status: Status, text: str) -> str:
    when = f", {datetime.fromtimestamp(status.ended, UTC):%H:%M:%S} UTC" if status.ended else ""
    return f"rank {status.rank} on {status.host} (pid {status.pid}{when}): {text}"


def _describe(status: Status) -> str:
    failure = status.failure
    if failure is None:
        return "no exception was recorded"
    place = f" at {failure.place}" if failure.place else ""
    return f"{failure.type}: {failure.message}{place}"


def _others(statuses: list[Status], first: Status) -> list[str]:
    """Say what the other ranks reported, in at most two lines."""
    others = [status for status in statuses if status is not first and status.failure]
    lines = [f"then {_named(status, _describe(status))}" for status in sorted(others, key=lambda s: s.ended or 0)[:2]]
    if len(others) > 2:
        lines.append(f"and {len(others) - 2} more ranks")
    return lines


if __name__ == "__main__":
    sys.exit(main())
