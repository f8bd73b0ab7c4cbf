"""Two network namespaces as two hosts: own addresses, own names, an sshd each, one shared file system.

    with two_hosts(tmp_path) as hosts:
        hosts.run("node-a", "hostname")           # as if typed on node-a
        hosts.start("node-b", "bash", "launch/…")  # in the background
        hosts.kill("node-b")                      # every process of the host at once, as when its power fails

Traffic stays on a veth pair between the two. Everything is removed at the end.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import ROOT

ADDRESSES = {"node-a": "10.77.0.1", "node-b": "10.77.0.2"}
NAMES = tuple(ADDRESSES)
_NEEDED = ("ip", "sshd", "ssh", "ssh-keygen", "unshare", "pdsh")


def need_two_hosts() -> None:
    """Skip, with the reason, where namespaces or the programs are not there."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if missing := [name for name in _NEEDED if not shutil.which(name, path=_path())]:
        pytest.skip(f"needs {', '.join(missing)}: bash tests/cluster/install.sh")
    probe = subprocess.run(["ip", "netns", "add", "adalora-probe"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no network namespaces here: {probe.stderr.strip()}")
    subprocess.run(["ip", "netns", "delete", "adalora-probe"], check=True)


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass
class TwoHosts:
    """Two hosts that run; see the module's docstring."""

    folder: Path
    tag: str
    started: list[subprocess.Popen] = field(default_factory=list)

    def namespace(self, host: str) -> str:
        return f"adalora-{self.tag}-{host}"

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("TORCHELASTIC_", "PYTEST_", "SLURM_", "ADALORA_"))
            and name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        }
        fixed = {
            "PATH": _path(),
            "PYTHONPATH": str(ROOT),
            "ADALORA_VENV": str(Path(sys.executable).parents[1]),
            "ADALORA_SSH_OPTIONS": f"-F {self.folder}/ssh_config",
            "GLOO_SOCKET_IFNAME": "eth0",
            "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu",
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        return kept | fixed | extra

    def start(self, host: str, *command: str, env: Mapping[str, str] | None = None, log: Path) -> subprocess.Popen:
        """Start a command on `host` in the project's folder, its output in `log`."""
        with open(log, "ab") as file:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.namespace(host), "unshare", "--uts", "bash", "-c",
                 f'hostname {host}; exec "$@"', "bash", *command],
                cwd=ROOT, env=self.environment(**(env or {})), stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def run(
        self, host: str, *command: str, env: Mapping[str, str] | None = None, timeout: float = 300
    ) -> tuple[int, str]:
        """Run a command on `host` to its end; return its exit code and output."""
        log = self.folder / f"run{len(self.started)}.log"
        process = self.start(host, *command, env=env, log=log)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{command} did not end in {timeout} s:\n{log.read_text()[-6000:]}") from None
        return code, log.read_text(errors="replace")

    def kill(self, host: str) -> None:
        """Kill every process of a host at once, its sshd too."""
        for _ in range(20):
            listing = subprocess.run(
                ["ip", "netns", "pids", self.namespace(host)], capture_output=True, text=True, check=False
            )
            pids = [int(pid) for pid in listing.stdout.split()]
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def start_sshd(self, host: str) -> None:
        self.start(
            host, shutil.which("sshd", path=_path()) or "sshd", "-D", "-e", "-f", f"{self.folder}/sshd_config",
            log=self.folder / f"{host}.sshd.log",
        )  # fmt: skip


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    """Make the two hosts, and remove them with all that runs in them."""
    hosts = TwoHosts(folder, tag=str(os.getpid() % 10000))
    a, b = (hosts.namespace(name) for name in NAMES)
    folder.mkdir(parents=True, exist_ok=True)
    _write_ssh(folder)
    etc = [Path("/etc/netns") / name for name in (a, b)]
    try:
        for name in (a, b):
            _ip("netns", "add", name)
        _ip("link", "add", "eth0", "netns", a, "type", "veth", "peer", "name", "eth0", "netns", b)
        for host, space, own in zip(NAMES, (a, b), etc, strict=True):
            _ip("-n", space, "address", "add", f"{ADDRESSES[host]}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            own.mkdir(parents=True)  # `ip netns exec` puts these files in place of /etc/hosts
            names = "".join(f"{address} {name}\n" for name, address in ADDRESSES.items())
            own.joinpath("hosts").write_text(f"127.0.0.1 localhost\n{names}10.77.0.9 node-gone\n")
        for host in NAMES:
            hosts.start_sshd(host)
        _wait_for_ssh(hosts)
        yield hosts
    finally:
        for name in NAMES:
            hosts.kill(name)
        for process in hosts.started:
            process.wait(20)
        for name, own in zip((a, b), etc, strict=True):
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
            shutil.rmtree(own, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def _write_ssh(folder: Path) -> None:
    for key in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    (folder / "sshd_config").write_text(
        f"Port 2222\nHostKey {folder}/host_key\nAuthorizedKeysFile {folder}/user_key.pub\nStrictModes no\n"
        f"PermitRootLogin yes\nPasswordAuthentication no\nUsePAM no\nPidFile none\n"
    )
    (folder / "ssh_config").write_text(
        f"Host *\n  Port 2222\n  IdentityFile {folder}/user_key\n  IdentitiesOnly yes\n  StrictHostKeyChecking no\n"
        f"  UserKnownHostsFile /dev/null\n  LogLevel ERROR\n  ServerAliveInterval 5\n  ServerAliveCountMax 2\n"
    )


def _wait_for_ssh(hosts: TwoHosts) -> None:
    deadline = time.monotonic() + 20
    answer = ""
    while time.monotonic() < deadline:
        code, answer = hosts.run("node-a", "ssh", "-F", f"{hosts.folder}/ssh_config", "node-b", "hostname", timeout=30)
        if code == 0 and "node-b" in answer:
            return
        time.sleep(0.3)
    raise AssertionError(f"sshd does not answer: {answer}\n{(hosts.folder / 'node-b.sshd.log').read_text()}")
