"""Ranks that begin with their imports done: a process imports what ranks need and forks them when it is asked.

Importing torch, transformers, TRL and DeepSpeed takes longer than most tests' work. A run through here has what
torchrun gives its ranks: a session each, the same variables, a store that the launcher holds, the others ended when one
fails. torchrun itself, deepspeed and whole commands are started cold where a test is about them.

    warm_ranks.py FD     serves one run at a time on the socket FD: a line of JSON in, one with its exit code out
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TextIO

import torch

ROOT = Path(__file__).resolve().parents[2]
IMPORTED = (
    "torch.distributed.tensor",
    "torch.distributed.fsdp",
    "transformers.trainer",
    "trl.trainer.sft_trainer",
    "deepspeed",
    "bitsandbytes",
    "datasets",
    "adalora_scale.training.run",
    "adalora_scale.training.trainers",
    "adalora_scale.verify.matrix",
)
FREE_VARIABLES = {"ADALORA_RANK_DIR", "DS_ACCELERATOR"}
"""Read at a run's own time, not when modules are imported (a machine without GPUs has one accelerator only)."""
GRACE_S = 30  # as torchrun: from SIGTERM to SIGKILL


class WarmRanks:
    """The test's side: one serving process, started with the first run."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._environment: dict[str, str] = {}

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Whether ranks with these variables would import the same things in the same way."""
        fixed = {name: value for name, value in environment.items() if name not in FREE_VARIABLES}
        return self._process is None or fixed == self._environment

    def start(self, command: list[str], world_size: int, folder: Path, environment: dict[str, str]) -> Launched:
        """Start `command` (what follows rank_main.py) on `world_size` ranks."""
        if self._process is None or self._process.poll() is not None:
            self._environment = {name: value for name, value in environment.items() if name not in FREE_VARIABLES}
            self._channel, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(
                    [sys.executable, __file__, str(theirs.fileno())],
                    cwd=ROOT,
                    env=self._environment,
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            self._lines = self._channel.makefile("rw")
        asked = {
            "command": list(command),
            "world_size": world_size,
            "folder": str(folder),
            "environment": dict(environment),
        }
        self._lines.write(json.dumps(asked) + "\n")
        self._lines.flush()
        return Launched(self._channel, self._lines)


class Launched:
    """A run's launcher, with what run_ranks asks of a Popen."""

    def __init__(self, channel: socket.socket, lines: TextIO) -> None:
        self._channel, self._lines = channel, lines
        self._returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Return the launcher's exit code; raises subprocess.TimeoutExpired."""
        if self._returncode is None:
            if not select.select([self._channel], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("warm ranks", timeout or 0)
            self._returncode = json.loads(self._lines.readline())["returncode"]
        return self._returncode


def serve(channel: socket.socket) -> None:
    """Answer requests until the test's side is gone; a forked rank returns from here and runs its script."""
    for name in IMPORTED:
        importlib.import_module(name)
    # A thread would not be in the forked process, and what it holds would stay held.
    threads = [thread.name for thread in threading.enumerate()]
    assert threads == ["MainThread"], f"importing started threads: {threads}"
    gc.freeze()
    lines = channel.makefile("rw")
    while line := lines.readline():
        asked = json.loads(line)
        launcher = os.fork()
        if launcher == 0:
            channel.close()
            lines.close()
            return launch(**asked)
        status = os.waitpid(launcher, 0)[1]
        lines.write(json.dumps({"returncode": os.waitstatus_to_exitcode(status)}) + "\n")
        lines.flush()
    os._exit(0)


def launch(command: list[str], world_size: int, folder: str, environment: dict[str, str]) -> None:
    """Fork the ranks and wait for them, as torchrun does; the ranks return from here, the launcher exits."""
    os.setsid()
    Path(folder, "launcher.pid").write_text(str(os.getpid()))
    log = os.open(Path(folder, "launcher.log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    listening = socket.create_server(("127.0.0.1", 0))
    os.environ.clear()
    os.environ |= environment | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(listening.getsockname()[1]),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": Path(folder).name,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
    }
    ranks = {}
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            os.setsid()
            listening.close()
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "ROLE_RANK": str(rank)}
            sys.argv = [str(Path(__file__).with_name("rank_main.py")), *command]
            return
        Path(folder, f"rank{rank}.pid").write_text(str(pid))
        ranks[pid] = rank
    store = torch.distributed.TCPStore(
        "127.0.0.1",
        listening.getsockname()[1],
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listening.detach(),
    )
    failed = _wait(ranks)
    del store
    os._exit(failed)


def _wait(ranks: dict[int, int]) -> int:
    """Wait for every rank; once one has failed the others get SIGTERM, and SIGKILL later. Returns 1 if any failed."""
    failed, deadline = 0, math.inf
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            if time.monotonic() > deadline:
                _signal(ranks, signal.SIGKILL)
                deadline = math.inf
            time.sleep(0.02)
            continue
        rank, code = ranks.pop(pid), os.waitstatus_to_exitcode(status)
        if code:
            print(f"rank {rank} ended with {code}", flush=True)
            if not failed:
                failed, deadline = 1, time.monotonic() + GRACE_S
                _signal(ranks, signal.SIGTERM)
    return failed


def _signal(pids: Iterable[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    import rank_main

    rank_main.main()
