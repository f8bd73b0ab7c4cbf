"""What torchrun, deepspeed, pdsh and srun said about the processes they watch, read from `*.launcher.log`."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

SUFFIX = ".launcher.log"

# "node7: " in front of a line is pdsh's, or on_hosts.sh's.
_HOST = re.compile(r"^(?P<host>[\w.-]+): (?=\S)")
_CLOSED = re.compile(
    r"(?:Sending process (\d+) closing signal|Closing process (\d+) via signal|Killing subprocess (\d+))"
)
_DIED = re.compile(r"failed \(exitcode: (?P<code>-?\d+)\) local_rank: (?P<local>\d+) \(pid: (?P<pid>\d+)\)")
_LOST = (
    re.compile(r"pdsh@\S+: (?P<host>[\w.-]+): ssh exited with exit code (?P<code>\d+)"),
    re.compile(r"srun: error: Node failure on (?P<host>[\w.-]+)"),
    re.compile(r"on_hosts: (?P<host>[\w.-]+) ended with exit code (?P<code>\d+)"),
)
SSH_LOST = 255
"""Exit code of ssh when the connection, not the command, ended."""


@dataclass(kw_only=True)
class LauncherNews:
    """What all launchers of a run said."""

    ended_by_launcher: set[tuple[str, int]] = field(default_factory=set)
    """(host, pid) of processes that a launcher ended because another had failed."""
    signals: dict[tuple[str, int], str] = field(default_factory=dict)
    """{(host, pid): name of the signal that killed it}."""
    lost_hosts: dict[str, str] = field(default_factory=dict)
    """{host: the line that says it was lost}."""


def read_launcher_logs(folder: Path) -> LauncherNews:
    """Read every launcher's log in `folder`; `<host>.launcher.log` speaks of `<host>` unless a line names another."""
    news = LauncherNews()
    for path in sorted(folder.glob(f"*{SUFFIX}")):
        own_host = path.name.removesuffix(SUFFIX)
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            _read_line(line.rstrip("\r"), own_host, news)
    for killed in news.signals:
        news.ended_by_launcher.discard(killed)
    return news


def signal_name(number: int) -> str:
    """Return for example `SIGKILL`."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read_line(line: str, own_host: str, news: LauncherNews) -> None:
    for pattern in _LOST:
        if found := pattern.search(line):
            code = found.groupdict().get("code")
            if code is None or int(code) == SSH_LOST:
                news.lost_hosts.setdefault(found["host"], line.strip())
            return
    prefix = _HOST.match(line)
    host = prefix["host"] if prefix else own_host
    if found := _CLOSED.search(line):
        news.ended_by_launcher.add((host, int(next(filter(None, found.groups())))))
    elif (found := _DIED.search(line)) and int(found["code"]) < 0:
        news.signals[host, int(found["pid"])] = signal_name(-int(found["code"]))
