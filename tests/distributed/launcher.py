"""Runs a script on real process groups, as `torchrun` and `deepspeed` start them, and brings back what each rank says.

    # in the script
    report(loss=loss.item())
    # in the test
    ranks = run_ranks(Path(__file__).parent / "workers" / "train.py", world_size=2)
    assert ranks[0]["loss"] == ranks[1]["loss"]

A rank that fails, and a run that does not end in time, raise `RankFailure` with the last output of every rank; a run
that hangs adds the stack of every thread of every rank. No process of a run outlives it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tests.distributed.rank_main import STACK_SIGNAL
from tests.distributed.warm_ranks import Launched, WarmRanks

ROOT = Path(__file__).resolve().parents[2]
RANK_MAIN = Path(__file__).with_name("rank_main.py")
SHOWN_CHARACTERS = 6000  # of each rank's output, in a failure's message
_WARM = WarmRanks()
PER_RUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LEFT_BEHIND = ("HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_PROGRESS_BARS", "PYTORCH_NVML_BASED_CUDA_CHECK")
"""What a verb or accelerate sets in the tests' own process; with them no later run would fit the warm ranks."""


@dataclass(frozen=True, kw_only=True)
class RankOutput:
    """What one rank reported and printed."""

    rank: int
    values: dict[str, Any]
    output: str

    def __getitem__(self, name: str) -> Any:
        if name not in self.values:
            raise KeyError(f"rank {self.rank} did not report {name!r}; it reported {sorted(self.values)}")
        return self.values[name]


class RankFailure(AssertionError):
    """A run failed or hung; `returncode` is the launcher's, None after a hang, `ranks` what there was to read."""

    def __init__(self, message: str, *, returncode: int | None, ranks: list[RankOutput]):
        super().__init__(message)
        self.returncode = returncode
        self.ranks = ranks


def report(**values: Any) -> None:
    """Called by a rank's script: hands JSON values to the test, added to those reported before."""
    path = Path(os.environ["ADALORA_RANK_DIR"], f"rank{os.environ['RANK']}.json")
    before = json.loads(path.read_text()) if path.exists() else {}
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(before | values))
    unfinished.replace(path)


def run_ranks(
    script: Path | str,
    world_size: int,
    args: Sequence[str] = (),
    *,
    launcher: Literal["warm", "torchrun", "deepspeed"] = "warm",
    timeout: float = 180,
    env: Mapping[str, str] | None = None,
) -> list[RankOutput]:
    """Run `script` on `world_size` ranks of this machine and return what each reported, in rank order.

    Args:
        script: A file, or a module's dotted name. Under "deepspeed" its first argument is `--local_rank=N`.
        args: The script's own arguments.
        launcher: Who starts the ranks. "warm" is torchrun with the imports done before (warm_ranks.py), or torchrun
            itself where `env` could change what is imported.
        timeout: Seconds for the whole run, imports included. DeepSpeed's compilation is not: it happens before, once;
            a torchrun script that uses DeepSpeed asks for it with the fixture `deepspeed_ops`.
        env: Added to the ranks' environment. GPUs are hidden unless it sets CUDA_VISIBLE_DEVICES.

    Raises:
        RankFailure: A rank failed, or the run did not end in time.
    """
    if launcher == "deepspeed":
        build_deepspeed_ops()
    with tempfile.TemporaryDirectory(prefix="ranks_") as name:
        folder = Path(name)
        target = str(script.resolve()) if isinstance(script, Path) else script
        environment = _environment(folder, launcher, env or {})
        process = _start(launcher, [target, *map(str, args)], world_size, folder, environment)
        returncode: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                returncode = process.wait(timeout)
            if returncode is None:
                _dump_stacks(folder)
        finally:
            if _kill_all(folder):
                _remove_build_locks()
            process.wait()

        ranks = [_read_rank(folder, rank) for rank in range(world_size)]
        if returncode != 0:
            what = f"did not end within {timeout:g} s" if returncode is None else f"failed with exit code {returncode}"
            launcher_output = (folder / "launcher.log").read_text(errors="replace")
            message = _describe(f"{launcher} on {world_size} ranks {what}: {target}", ranks, launcher_output)
            raise RankFailure(message, returncode=returncode, ranks=ranks)
        return ranks


@functools.cache
def build_deepspeed_ops() -> None:
    """Compile DeepSpeed's operators, a minute or two where tests/run.sh has not: no rank's timeout includes that."""
    environment = _environment(Path(os.devnull), "deepspeed", {})
    command = [sys.executable, str(Path(__file__).with_name("build_ops.py"))]
    result = subprocess.run(command, env=environment, timeout=1200, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"DeepSpeed could not build its operators (is a C++ compiler installed?):\n{result.stderr}")


def _start(
    launcher: str, script: list[str], world_size: int, folder: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes] | Launched:
    if launcher == "warm" and _WARM.fits(environment):
        return _WARM.start(script, world_size, folder, environment)
    with open(folder / "launcher.log", "wb") as log:
        return subprocess.Popen(
            [*_launch_command(launcher, world_size), str(RANK_MAIN), *script],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _launch_command(launcher: str, world_size: int) -> list[str]:
    if launcher in ("warm", "torchrun"):
        options = ["--standalone", "--local-addr", "127.0.0.1", "--nnodes", "1", "--nproc-per-node", str(world_size)]
        return [sys.executable, "-m", "torch.distributed.run", *options]
    if launcher == "deepspeed":
        options = ["--num_gpus", str(world_size), "--master_addr", "127.0.0.1", "--master_port", str(_free_port())]
        return [str(Path(sys.executable).with_name("deepspeed")), *options]
    raise ValueError(f"launcher must be 'warm', 'torchrun' or 'deepspeed', not {launcher!r}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(folder: Path, launcher: str, extra: Mapping[str, str]) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in (*PER_RUN_VARIABLES, *LEFT_BEHIND)
        and not name.startswith(("TORCHELASTIC_", "PYTEST_", "SLURM_"))
    }
    fixed = {
        "ADALORA_RANK_DIR": str(folder),  # also marks every process of the run, see _processes
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja, for DeepSpeed
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if launcher == "deepspeed":
        fixed["DS_ACCELERATOR"] = "cpu"
    if "CUDA_VISIBLE_DEVICES" not in extra:
        fixed |= {"CUDA_VISIBLE_DEVICES": "", "ADALORA_HIDE_GPUS": "1"}
    return inherited | fixed | dict(extra)


def _dump_stacks(folder: Path) -> None:
    """Ask every rank for the stacks of its threads and wait until they are in its log."""
    sizes: dict[Path, int] = {}
    for pid_file in folder.glob("rank*.pid"):
        log = pid_file.with_suffix(".log")
        size = log.stat().st_size
        with contextlib.suppress(ProcessLookupError, ValueError):
            os.kill(int(pid_file.read_text()), STACK_SIGNAL)
            sizes[log] = size
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and any(log.stat().st_size == size for log, size in sizes.items()):
        time.sleep(0.05)
    time.sleep(0.5)  # the last lines


def _processes(folder: Path) -> Iterator[int]:
    """Yield every live process of the run: by its variables, or, forked ones, by the session of a rank or launcher."""
    mark = f"ADALORA_RANK_DIR={folder}".encode()
    sessions = {pid_file.read_bytes() for pid_file in folder.glob("*.pid")}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            session = (entry / "stat").read_bytes().rpartition(b")")[2].split()[3]
            marked = session in sessions or mark in (entry / "environ").read_bytes().split(b"\0")
            if marked and int(entry.name) != os.getpid():
                yield int(entry.name)


def _kill_all(folder: Path) -> bool:
    """Kill what is left of the run, children started meanwhile included; return whether there was anything."""
    found = False
    deadline = time.monotonic() + 10
    while (left := list(_processes(folder))) and time.monotonic() < deadline:
        found = True
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return found


def _remove_build_locks() -> None:
    """A rank killed while it compiles leaves a lock on which every later run would wait."""
    if builds := os.environ.get("TORCH_EXTENSIONS_DIR"):  # private to this test run, see tests/conftest.py
        for lock in Path(builds).rglob("lock"):
            lock.unlink(missing_ok=True)


def _read_rank(folder: Path, rank: int) -> RankOutput:
    log, values = folder / f"rank{rank}.log", folder / f"rank{rank}.json"
    return RankOutput(
        rank=rank,
        values=json.loads(values.read_text()) if values.exists() else {},
        output=log.read_text(errors="replace") if log.exists() else "(this rank never started)",
    )


def _describe(headline: str, ranks: list[RankOutput], launcher_output: str) -> str:
    sections = [(f"rank {rank.rank}", rank.output) for rank in ranks] + [("launcher", launcher_output)]
    return "\n".join([headline, *(f"---- {name}\n{text[-SHOWN_CHARACTERS:].rstrip()}" for name, text in sections)])
