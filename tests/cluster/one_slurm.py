"""A SLURM of its own on this machine: munged, slurmctld and two slurmd, node1 and node2, each with one pretended GPU.

    with one_slurm(tmp_path) as slurm:
        job = slurm.submit("--nodes=2", "launch/slurm.sbatch", "--config", …)
        slurm.wait(job)

All daemons listen on the loopback interface and end with the block.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.conftest import ROOT

NODES = ("node1", "node2")
_NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue")
_CONFIG = """\
ClusterName=adalora
SlurmctldHost={hostname}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=10
MailProg=/bin/true
GresTypes=gpu
SlurmdParameters=config_overrides
NodeName=node1 NodeHostname={hostname} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 Gres=gpu:1
NodeName=node2 NodeHostname={hostname} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 Gres=gpu:1
PartitionName=all Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def need_slurm() -> None:
    """Skip, with the reason, where SLURM is not installed or cannot run."""
    if os.geteuid() != 0:
        pytest.skip("a SLURM of one's own needs root")
    if missing := [name for name in _NEEDED if not shutil.which(name, path=_path())]:
        pytest.skip(f"needs {', '.join(missing)}: bash tests/cluster/install.sh")


def _path() -> str:
    return f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


@dataclass
class OneSlurm:
    """The running cluster; see the module's docstring."""

    folder: Path
    environment: dict[str, str]
    daemons: list[subprocess.Popen] = field(default_factory=list)

    def call(self, *command: str, timeout: float = 60) -> str:
        """Run one of SLURM's commands and return what it printed."""
        result = subprocess.run(
            command, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        if result.returncode:
            raise AssertionError(f"{command} failed: {result.stderr or result.stdout}\n{self.tail()}")
        return result.stdout.strip()

    def submit(self, *arguments: str) -> str:
        """Submit a job and return its number."""
        return self.call("sbatch", "--parsable", *arguments)

    def state(self, job: str) -> dict[str, str]:
        """Return what SLURM says about a job, for example {"JobState": "RUNNING", "Restarts": "0"}."""
        words = self.call("scontrol", "show", "job", job, "--oneliner").split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, job: str, *states: str, timeout: float = 240) -> dict[str, str]:
        """Wait until a job is in one of `states`, by default at its end."""
        wanted = states or ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            state = self.state(job)
            if state["JobState"] in wanted:
                return state
            time.sleep(0.5)
        raise AssertionError(
            f"job {job} is {self.state(job)['JobState']}, not {wanted}, after {timeout} s\n{self.tail()}"
        )

    def tail(self) -> str:
        """Return the last lines of the daemons, for a failure's message."""
        return "\n".join(f"{log.name}: {log.read_text()[-1500:]}" for log in sorted(self.folder.glob("*.daemon.log")))

    def start(self, name: str, *command: str) -> None:
        with open(self.folder / f"{name}.daemon.log", "wb") as log:
            self.daemons.append(
                subprocess.Popen(
                    command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
            )


@contextlib.contextmanager
def one_slurm() -> Iterator[OneSlurm]:
    """Start the daemons and end them, with every job."""
    # munge wants its socket where everyone may look, below folders nobody else may write to; pytest's are private.
    folder = Path(tempfile.mkdtemp(prefix="adalora_slurm_", dir="/run"))
    folder.chmod(0o755)
    for name in ("state", *NODES):
        (folder / name).mkdir()
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TORCHELASTIC_", "PYTEST_", "ADALORA_"))}
    kept |= {
        "PATH": _path(),
        "SLURM_CONF": str(folder / "slurm.conf"),
        "PYTHONPATH": str(ROOT),
        "ADALORA_VENV": str(Path(sys.executable).parents[1]),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    slurm = OneSlurm(folder, kept)
    (folder / "slurm.conf").write_text(
        _CONFIG.format(folder=folder, hostname=socket.gethostname(), ports=[_free_port() for _ in range(3)])
    )
    (folder / "gres.conf").write_text("NodeName=node[1-2] Name=gpu File=/dev/zero\n")
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    try:
        slurm.start(
            "munged", "munged", "--foreground", "--num-threads=10", f"--key-file={key}",
            f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid", f"--seed-file={folder}/munge.seed",
        )  # fmt: skip
        _until(lambda: (folder / "munge.socket").exists(), slurm)
        slurm.start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            slurm.start(node, "slurmd", "-D", "-N", node)
        _until(lambda: slurm.call("sinfo", "-h", "-o", "%T %D") == "idle 2", slurm)
        yield slurm
    finally:
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            slurm.call("scancel", "--full", "--signal=KILL", "--me", timeout=10)
            slurm.call("scancel", "--me", timeout=10)
            _until(lambda: not slurm.call("squeue", "-h"), slurm)
        for daemon in reversed(slurm.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in slurm.daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(15)
            daemon.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _until(condition, slurm: OneSlurm, timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with contextlib.suppress(AssertionError):
            if condition():
                return
        time.sleep(0.3)
    raise AssertionError(f"SLURM did not get there in {timeout} s\n{slurm.tail()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
