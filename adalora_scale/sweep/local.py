"""Trials on this machine: child processes, as many at a time as were asked for, each with its part of the GPUs."""

from __future__ import annotations

import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from adalora_scale.errors import INTERRUPTED_EXIT_CODE, UserError
from adalora_scale.sweep.search import Source
from adalora_scale.sweep.trial import Outcome, Trial, finished

_LOG = "train.log"
_CLI = "adalora_scale.cli"
_MODULE = {"deepspeed": "--module"}
"""The launchers' words for Python's -m, where they have others."""


class Local:
    """Runs trials as child processes.

    Args:
        config: the YAML file that every trial starts from.
        folder: of the trials.
        metric: of the final evaluation.
        launcher: words before the module, such as `torchrun --nproc-per-node 8`; None: this Python.
        jobs: trials at a time.

    Raises:
        UserError: more trials at a time than GPUs.
    """

    def __init__(self, config: Path, folder: Path, metric: str, launcher: str | None, jobs: int) -> None:
        self._config, self._folder, self._metric = config, folder, metric
        self._command = _command(launcher)
        self._parts = _parts(_visible_gpus(), jobs)
        self._jobs = jobs
        self._children: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        """Whether a signal asked the sweep to end."""

    def run(self, source: Source, report: Callable[[Trial, Outcome], None]) -> None:
        """Run what the source gives until there is no more, a signal arrives, or nothing but failures is seen."""
        failures = threading.Semaphore(2)  # a mistake in the config fails every trial: two say so

        def work(slot: int) -> None:
            some_worked = False
            while not self.stopping.is_set() and (trial := source.take()):
                outcome = self._outcome(trial, slot)
                source.tell(trial, outcome)
                report(trial, outcome)
                some_worked |= outcome.state == "done"
                if outcome.state == "failed" and not some_worked and not failures.acquire(blocking=False):
                    return

        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(self._jobs) as pool:
                for future in [pool.submit(work, slot) for slot in range(self._jobs)]:
                    future.result()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: object) -> None:
        """Ask every trial for a checkpoint and an orderly end."""
        self.stopping.set()
        for child in list(self._children):
            child.send_signal(signal.SIGTERM)

    def _outcome(self, trial: Trial, slot: int) -> Outcome:
        folder = self._folder / trial.name
        if known := finished(folder, self._metric):
            return replace(known, earlier=True)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            try:  # the child inherits the lock: a trial that outlives its sweep is still seen as running
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return Outcome("running elsewhere", reason="another process trains in its folder")
            code = self._train(trial, folder, slot, lock.fileno())
        if code == INTERRUPTED_EXIT_CODE or self.stopping.is_set():
            return Outcome("stopped", reason="stopped by a signal; the same command goes on")
        if code:
            return Outcome("failed", reason=f"exit code {code}: {_last_error(folder / _LOG)}")
        return finished(folder, self._metric) or Outcome("failed", reason=f"no run.json; see {folder / _LOG}")

    def _train(self, trial: Trial, folder: Path, slot: int, lock: int) -> int:
        environment = dict(os.environ)
        if self._parts:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._parts[slot])
        command = [*self._command, "--config", str(self._config), *trial.overrides(folder)]
        with (folder / _LOG).open("ab") as log:
            with self._lock:
                if self.stopping.is_set():
                    return INTERRUPTED_EXIT_CODE
                # A session of its own: Ctrl-C at a terminal reaches the sweep alone, which asks for a checkpoint.
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,
                    pass_fds=(lock,),
                )
                self._children.add(child)
            code = child.wait()
            self._children.discard(child)
        return code


def _command(launcher: str | None) -> list[str]:
    """Return what starts `adalora-scale train`, before its own arguments."""
    words = shlex.split(launcher) if launcher else [sys.executable]
    return [*words, _MODULE.get(Path(words[0]).name, "-m"), _CLI, "train"]


def _visible_gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [name for name in named.split(",") if name]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())]


def _parts(gpus: list[str], jobs: int) -> list[list[str]]:
    """Return each slot's GPUs; empty where there is nothing to share out."""
    if jobs == 1 or not gpus:
        return []
    share = len(gpus) // jobs
    if not share:
        raise UserError(f"--jobs {jobs} is more than the {len(gpus)} GPUs here; give at most one job a GPU.")
    return [gpus[slot * share : (slot + 1) * share] for slot in range(jobs)]


def _last_error(log: Path) -> str:
    """Return the line that says why: the one-line error, or the last one there is."""
    lines = [line.strip() for line in log.read_text("utf-8", errors="replace").splitlines() if line.strip()]
    for line in reversed(lines):
        if line.startswith("error"):
            return f"{line} ({log})"
    return f"{lines[-1]} ({log})" if lines else f"no output ({log})"
