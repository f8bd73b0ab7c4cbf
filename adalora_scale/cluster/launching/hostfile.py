"""Hostfiles: a line `name slots=8` a host, as deepspeed reads them, checked before anything is started.

deepspeed itself answers a bad line with a traceback, asks only the first host whether ssh works, and starts unequal
hosts without a word.
"""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from adalora_scale.errors import UserError
from adalora_scale.reading.text import read_text

_LINE = re.compile(r"(?P<name>[A-Za-z0-9_][A-Za-z0-9_.:-]*)(?:\s+slots\s*=\s*(?P<slots>\S+))?")
SSH_TIMEOUT_S = 10


@dataclass(frozen=True, kw_only=True)
class Host:
    """One line of a hostfile."""

    name: str
    """As ssh knows it."""
    slots: int
    """Ranks to start on it, one a GPU."""
    line: int
    """Where it stands, from 1."""


def read_hostfile(path: Path) -> list[Host]:
    """Parse a hostfile.

    Raises:
        UserError: it cannot be read, has no host, a line that is none, a host twice (by name or by address), a host
            without slots, or hosts with unequal slots.
    """
    lines = read_text(path, "the hostfile").splitlines()
    hosts: list[Host] = []
    for number, line in enumerate(lines, start=1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        hosts.append(_parse(text, f"{path} line {number}", number))
    if not hosts:
        raise UserError(f"{path} names no host; write a line such as `node1 slots=8` for each.")
    _refuse_duplicates(hosts, path)
    most = max(hosts, key=lambda host: host.slots)
    for host in hosts:
        if host.slots != most.slots:
            raise UserError(
                f"{path} line {host.line}: {host.name} has slots={host.slots}, {most.name} has slots={most.slots}; "
                f"ranks need equal hosts. Write slots={min(h.slots for h in hosts)} for all, or leave hosts out."
            )
    return hosts


def check_reachable(hosts: Sequence[Host], ssh_options: str, *, port: int | None = None) -> None:
    """Reach every host over ssh, all at once, and see that `port` is free on the first.

    Args:
        hosts: who must answer.
        ssh_options: more options for ssh, as one string.
        port: where the rendezvous will listen on the first host.

    Raises:
        UserError: naming the first host that does not answer in time, or whose port is taken.
    """
    probe = f"import socket; s = socket.socket(); s.setsockopt(1, 2, 1); s.bind(('', {port or 0}))"
    commands = ["true"] * len(hosts)
    if port:
        commands[0] = f"{shlex.quote(sys.executable)} -c {shlex.quote(probe)}"
    with ThreadPoolExecutor(max_workers=32) as pool:
        answers = list(
            pool.map(lambda pair: _ssh(pair[0].name, ssh_options, pair[1]), zip(hosts, commands, strict=True))
        )
    for host, (code, said) in zip(hosts, answers, strict=True):
        if code == 0:
            continue
        if "Address already in use" in said:
            raise UserError(f"port {port} of {host.name} is in use; choose another: PORT=N, or end what listens there.")
        raise UserError(
            f"host {host.name} (line {host.line} of the hostfile) cannot be reached over ssh within {SSH_TIMEOUT_S} s: "
            f"{said or f'exit code {code}'}. Try `ssh -o BatchMode=yes {host.name} true`."
        )


def _parse(text: str, place: str, number: int) -> Host:
    found = _LINE.fullmatch(text)
    if found is None or found["slots"] is None:
        raise UserError(f"{place}: `{text}` is no host; write `name slots=8`.")
    if not found["slots"].isdecimal() or len(found["slots"]) > 6:
        raise UserError(f"{place}: slots={found['slots']} is no number; write how many GPUs {found['name']} has.")
    if int(found["slots"]) == 0:
        raise UserError(f"{place}: {found['name']} has slots=0; give it its number of GPUs, or remove the line.")
    return Host(name=found["name"], slots=int(found["slots"]), line=number)


def _refuse_duplicates(hosts: Sequence[Host], path: Path) -> None:
    by_name: dict[str, Host] = {}
    by_address: dict[str, Host] = {}
    for host in hosts:
        try:
            address = socket.gethostbyname(host.name)
        except (OSError, UnicodeError):  # the latter of labels that are too long
            address = host.name  # only ssh's configuration may know it
        same = by_name.get(host.name.lower()) or by_address.get(address)
        if same is not None:
            alias = "" if same.name == host.name else f" is {same.name} ({address}), which"
            raise UserError(
                f"{path} line {host.line}: {host.name}{alias} stands in line {same.line} already; its GPUs would be "
                f"given out twice. Keep one line a host."
            )
        by_name[host.name.lower()] = by_address[address] = host


def _ssh(name: str, options: str, command: str) -> tuple[int, str]:
    arguments = ["ssh", "-n", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_TIMEOUT_S}", *shlex.split(options)]
    try:
        result = subprocess.run(
            [*arguments, name, command], capture_output=True, text=True, timeout=SSH_TIMEOUT_S + 5, check=False
        )
    except subprocess.TimeoutExpired:
        return 255, "no answer"
    except FileNotFoundError:
        raise UserError("ssh is not installed here; install OpenSSH's client, or start each node by hand.") from None
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("Warning:")]
    return result.returncode, lines[-1].strip() if lines else ""
