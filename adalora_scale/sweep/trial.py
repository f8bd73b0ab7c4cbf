"""One trial: an ordinary run in a folder of its own, and what is known of it from that folder alone."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adalora_scale.errors import UserError
from adalora_scale.files import write_json, writing
from adalora_scale.sweep.space import Settings, number_or_text
from adalora_scale.training.records import WRONG_END_NAME

State = Literal["done", "failed", "stopped", "queued", "running elsewhere", "not tried"]
_NOTE = "trial.json"
SLURM_NOTE = "slurm-job"
"""The number of the job that a trial was submitted as."""


@dataclass(frozen=True, eq=False)
class Trial:
    """Values to train with; two that train in the same folder are equal."""

    settings: Settings
    seed: int
    again: bool = False
    """Whether it is the winner on one more seed."""

    @property
    def name(self) -> str:
        """Return the folder's name: the values for people, a digest for what the values' text leaves out.

        1e-2 and 0.01 are the same trial, and so is another order of the keys.
        """
        settings = sorted(self.settings)
        words = [f"{key.rsplit('.', 1)[-1]}-{_plain(value)}" for key, value in settings] or ["config"]
        readable = re.sub(r"[^A-Za-z0-9.+-]+", "-", "_".join([*words, f"seed-{self.seed}"]))[:100]
        meant = [[key, number_or_text(value)] for key, value in settings]
        return f"{readable}-{hashlib.sha256(json.dumps([meant, self.seed]).encode()).hexdigest()[:6]}"

    def __eq__(self, other: object) -> bool:
        """Whether both train the same."""
        return isinstance(other, Trial) and self.name == other.name

    def __hash__(self) -> int:
        """Return a hash of the folder's name."""
        return hash(self.name)

    def __str__(self) -> str:
        """Return what progress says."""
        words = [f"{key}={value}" for key, value in self.settings] or ["the config as it is"]
        return " ".join([*words, f"seed {self.seed}"] if self.again else words)

    def overrides(self, folder: Path) -> list[str]:
        """Return the run's overrides; one that was stopped goes on from its last checkpoint."""
        return [
            *(f"{key}={value}" for key, value in self.settings),
            f"training.seed={self.seed}",
            f"training.output_dir={json.dumps(str(folder), ensure_ascii=False)}",  # YAML would cut a path at ' #'
            "training.overwrite_output_dir=false",
            "training.resume_from_checkpoint=auto",
        ]


def _plain(value: str) -> str:
    number = number_or_text(value)
    return f"{number:g}" if isinstance(number, float) else number


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    state: State
    value: float | None = None
    """The metric, NaN where training diverged; None unless it is done."""
    spent: str = ""
    """What is left of the adapter, with its unit."""
    seconds: float | None = None
    reason: str = ""
    """Why there is no value."""
    ranks: int | None = None
    """How many processes trained."""
    earlier: bool = False
    """Whether an earlier call of the sweep ran it."""

    @property
    def finite(self) -> float | None:
        """The metric, where it is there and a number."""
        return self.value if self.value is not None and math.isfinite(self.value) else None

    @property
    def why(self) -> str:
        """The first sentence of the reason."""
        return self.reason.split(". ")[0]

    @property
    def diverged(self) -> bool:
        """Whether it is done and its metric is not a number."""
        return self.value is not None and self.finite is None


def finished(folder: Path, metric: str) -> Outcome | None:
    """Read a finished run's figures; None where there is none. One that training gave up has no number for a metric.

    Raises:
        UserError: the final evaluation has no such metric.
    """
    if (folder / WRONG_END_NAME).exists():
        reason = json.loads((folder / WRONG_END_NAME).read_text("utf-8"))["reason"]
        return Outcome("done", math.nan, reason=reason)
    try:
        summary: dict[str, Any] = json.loads((folder / "run.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    final = summary["final"]
    if metric not in final:
        known = ", ".join(sorted(name for name in final if name.startswith("eval_")))
        raise UserError(f"--metric {metric} is not in the final evaluation of {folder}; it has {known or 'nothing'}.")
    budget = summary["budget"]
    spent = f"{budget['spent']:,} {budget['unit']}" if budget else ""
    value = math.nan if final[metric] is None else float(final[metric])
    return Outcome("done", value, spent, summary["wall_time_s"], ranks=summary.get("world_size"))


@contextlib.contextmanager
def claimed(trial: Trial, folder: Path) -> Iterator[Path | None]:
    """Make a trial's folder and hold it while inside; None: another process holds it, or a run of it is still alive.

    The lock's file is given; who starts processes writes their group there (`note_group`), because a launcher's ranks
    may outlive it and hold no lock.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    file = folder / ".lock"
    with file.open("a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield None
            return
        if _still_trains(file):
            yield None
            return
        write_json(folder / _NOTE, {"settings": trial.settings, "seed": trial.seed, "again": trial.again})
        yield file


def note_group(lock: Path, group: int) -> None:
    """Write down which process group trains in a claimed folder."""
    with writing(lock):  # in place: the lock is the file, not its name
        lock.write_text(f"{socket.gethostname()} {group}\n", "utf-8")


def group_lives(group: int) -> bool:
    """Whether a process of the group is there, other than dead ones that nobody reaps (containers without an init)."""
    import psutil

    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _still_trains(lock: Path) -> bool:
    words = lock.read_text("utf-8").split()
    return len(words) == 2 and words[0] == socket.gethostname() and group_lives(int(words[1]))


def known_trials(folder: Path) -> list[Trial]:
    """Return every trial that was ever begun in a sweep's folder of trials."""
    found = []
    for note in sorted(folder.glob(f"*/{_NOTE}")):
        said = json.loads(note.read_text("utf-8"))
        settings = tuple((key, value) for key, value in said["settings"])
        found.append(Trial(settings, said["seed"], said["again"]))
    return found
