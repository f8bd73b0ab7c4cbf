"""Hosts on one machine: network namespaces whose only way to each other is a switch, a bridge in one more namespace.

Nothing outside these namespaces is touched or reached, and leaving the context removes them with whatever runs inside.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

_SUBNET = "10.213.7"


class BridgedHosts:
    """`count` hosts with one interface `eth0` each."""

    def __init__(self, count: int) -> None:
        self.names = [f"bh{os.getpid()}x{index}" for index in range(count)]
        self.addresses = [f"{_SUBNET}.{10 + index}" for index in range(count)]
        self._switch = f"bh{os.getpid()}sw"

    def shape(self, host: int, *discipline: str) -> None:
        """Give a host's outgoing link a queueing discipline; skips the test where the kernel does not know it."""
        command = ["tc", "qdisc", "replace", "dev", "eth0", "root", *discipline]
        result = self._in(self.names[host], *command)
        if "unknown" in result.stderr:
            pytest.skip(f"this kernel has no '{discipline[0]}' queueing discipline (tc: {result.stderr.strip()})")
        assert result.returncode == 0, result.stderr

    def torchrun(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        nproc: int = 1,
        env: Mapping[int, Mapping[str, str]] | None = None,
        cwd: Mapping[int, Path] | None = None,
        timeout: float = 150,
    ) -> list[subprocess.CompletedProcess[str]]:
        """Run a module on every host, as one job, and return what each host's torchrun printed.

        `timeout` is multiplied by ADALORA_TEST_SLOWNESS, which an emulated machine sets (netem_vm.sh).
        """
        processes = []
        for index, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            job = ["--nnodes", str(len(self.names)), "--node-rank", str(index), "--nproc-per-node", str(nproc)]
            job += ["--master-addr", self.addresses[0], "--master-port", "29511", "--local-addr", address]
            processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", name, "torchrun", *job, "-m", module, *arguments],
                    env=os.environ | {"GLOO_SOCKET_IFNAME": "eth0"} | dict((env or {}).get(index, {})),
                    cwd=(cwd or {}).get(index),
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        deadline = time.monotonic() + timeout * float(os.environ.get("ADALORA_TEST_SLOWNESS", "1"))
        results = []
        for process in processes:
            out, err = process.communicate(timeout=max(deadline - time.monotonic(), 1))
            results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        return results

    def _in(self, name: str, *command: str) -> subprocess.CompletedProcess[str]:
        return _run("ip", "netns", "exec", name, *command)

    def _build(self) -> None:
        for name in (self._switch, *self.names):
            _must("ip", "netns", "add", name)
        _must("ip", "-n", self._switch, "link", "add", "br0", "type", "bridge")
        _must("ip", "-n", self._switch, "link", "set", "br0", "up")
        for index, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            port = f"port{index}"
            link = ["link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name]
            _must("ip", "-n", self._switch, *link)
            _must("ip", "-n", self._switch, "link", "set", port, "master", "br0", "up")
            _must("ip", "-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _must("ip", "-n", name, "link", "set", device, "up")

    def _remove(self) -> None:
        for name in (*self.names, self._switch):
            for pid in _run("ip", "netns", "pids", name).stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            _run("ip", "netns", "del", name)


@contextlib.contextmanager
def bridged_hosts(count: int) -> Iterator[BridgedHosts]:
    """Make the hosts; skips the test where this user or machine cannot."""
    if not (shutil.which("ip") and shutil.which("tc")):
        pytest.skip("needs the commands ip and tc (iproute2)")
    hosts = BridgedHosts(count)
    try:
        try:
            hosts._build()
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {error.stderr.strip()}")
        yield hosts
    finally:
        hosts._remove()


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _must(*command: str) -> None:
    subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
