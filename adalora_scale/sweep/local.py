"""Trials on this machine: child processes, as many at a time as were asked for, each with its part of the GPUs."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from adalora_scale.errors import INTERRUPTED_EXIT_CODE, USER_ERROR_EXIT_CODE, UserError
from adalora_scale.messages import say
from adalora_scale.sweep.search import Source
from adalora_scale.sweep.trial import SLURM_NOTE, Outcome, Trial, claimed, finished, group_lives, note_group

_LOG = "train.log"
_CLI = "adalora_scale"
_MODULE = {"deepspeed": ["--no_local_rank", "--module"]}
"""The launchers' words for Python's -m, where they have others."""
_HOPELESS = 3


class Local:
    """Runs trials as child processes.

    Args:
        config: the YAML file that every trial starts from.
        folder: of the trials.
        metric: of the final evaluation.
        launcher: words before the module, such as `torchrun --nproc-per-node 8`; None: this Python.
        jobs: trials at a time.

    Raises:
        UserError: the launcher is not there or cannot run several at a time, or more trials at a time than GPUs.
    """

    def __init__(self, config: Path, folder: Path, metric: str, launcher: str | None, jobs: int) -> None:
        self._config, self._folder, self._metric = config, folder, metric
        self._command = _command(launcher, jobs)
        self._parts = _parts(_visible_gpus(), jobs)
        self._jobs = jobs
        self._groups: set[int] = set()
        self._lock = threading.Lock()
        self.stopping = threading.Event()
        """Whether a signal asked the sweep to end."""

    def run(self, source: Source, report: Callable[[Trial, Outcome], None]) -> bool:
        """Run what the source gives; return whether it has no more (a signal or a hopeless config end it before).

        A mistake in the config fails every trial in the same way: where the first ones are all refused, the rest is
        not tried.
        """
        refused, some_worked = 0, False

        def work(slot: int) -> None:
            nonlocal refused, some_worked
            while not self.stopping.is_set() and (trial := source.take()):
                if not some_worked and refused >= _HOPELESS:
                    with self._lock:
                        report(trial, Outcome("not tried", reason=f"the first {refused} trials were all refused"))
                    continue
                outcome = self._outcome(trial, slot)
                with self._lock:
                    source.tell(trial, outcome)
                    report(trial, outcome)
                    refused += outcome.state == "failed" and f"exit code {USER_ERROR_EXIT_CODE}:" in outcome.reason
                    some_worked |= outcome.state not in ("failed", "not tried")

        before = {number: signal.signal(number, self._stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with ThreadPoolExecutor(self._jobs) as pool:
                for future in [pool.submit(work, slot) for slot in range(self._jobs)]:
                    future.result()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return not self.stopping.is_set()

    def _stop(self, number: int, frame: object) -> None:
        """Ask every trial for a checkpoint and an orderly end; asked again, end them at once."""
        again = self.stopping.is_set()
        self.stopping.set()
        groups = list(self._groups)
        if groups and not again:
            say(
                f"stopping: {len(groups)} trial(s) asked for a checkpoint; a second signal ends them without",
                to=sys.stderr,
            )
        for group in groups:
            _send(group, signal.SIGKILL if again else signal.SIGTERM)

    def _outcome(self, trial: Trial, slot: int) -> Outcome:
        folder = self._folder / trial.name
        if known := finished(folder, self._metric):
            return replace(known, earlier=True)
        if (folder / SLURM_NOTE).exists():
            return Outcome("running elsewhere", reason="submitted to SLURM; go on with --sbatch")
        with claimed(trial, folder) as lock:
            if lock is None:
                return Outcome("running elsewhere", reason="another process trains in its folder")
            if known := finished(folder, self._metric):  # by another call, meanwhile
                return replace(known, earlier=True)
            log = folder / _LOG
            start = log.stat().st_size if log.exists() else 0
            code = self._train(trial, folder, slot, lock)
            if known := finished(folder, self._metric):
                return known
        if code == INTERRUPTED_EXIT_CODE or self.stopping.is_set():
            return Outcome("stopped", reason="by a signal; the same command goes on")
        if code:
            return Outcome("failed", reason=f"exit code {code}: {_last_error(log, start)}")
        return Outcome("failed", reason=f"no run.json; see {log}")

    def _train(self, trial: Trial, folder: Path, slot: int, lock: Path) -> int:
        environment = dict(os.environ)
        if self._parts:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._parts[slot])
        command = [*self._command, "--config", str(self._config), *trial.overrides(folder)]
        with (folder / _LOG).open("ab") as log:
            # A session of its own: Ctrl-C at a terminal reaches the sweep alone, which asks for a checkpoint. The group
            # has the ranks in it: launchers die of a signal without passing it on.
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            self._groups.add(child.pid)
            try:
                note_group(lock, child.pid)
            except UserError:
                _send(child.pid, signal.SIGTERM)  # nobody else would know that it trains
                raise
            if self.stopping.is_set():  # the signal came while it was started
                _send(child.pid, signal.SIGTERM)
            code = child.wait()
            while group_lives(child.pid):  # ranks that outlive their launcher
                time.sleep(0.1)
            self._groups.discard(child.pid)
        return code


def _send(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return  # it has just ended


def _command(launcher: str | None, jobs: int) -> list[str]:
    """Return what starts `adalora-scale train`, before its own arguments."""
    if launcher is None:
        return [sys.executable, "-m", _CLI, "train"]
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f'--launcher "{launcher}": {error}.') from None
    if not words or not shutil.which(words[0]):
        raise UserError(f'--launcher "{launcher}" is not a command here; write torchrun …, deepspeed … or the like.')
    module = _MODULE.get(Path(words[0]).name)
    if module and jobs > 1:
        raise UserError(
            "--jobs cannot go with deepspeed, which chooses GPUs and port itself; use torchrun --standalone."
        )
    return [*words, *(module or ["-m"]), _CLI, "train"]


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


def _last_error(log: Path, start: int) -> str:
    """Return the line that says why this attempt ended: the one-line error, an exception's, or the last there is."""
    with log.open("rb") as file:
        file.seek(start)
        lines = [line.strip() for line in file.read().decode("utf-8", errors="replace").splitlines() if line.strip()]
    for form in (r"error( \(rank \d+\))?: ", r"(\[rank\d+\]: ?)?[\w.]*(Error|Exception|Interrupt)\b: "):
        for line in reversed(lines):
            if re.match(form, line):
                return f"{line} ({log})"
    return f"{lines[-1]} ({log})" if lines else f"no output ({log})"
