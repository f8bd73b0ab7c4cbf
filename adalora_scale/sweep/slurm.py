"""Trials as SLURM jobs of their own: submitted once, and looked up in the queue by later calls."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adalora_scale.errors import UserError
from adalora_scale.sweep.search import Source
from adalora_scale.sweep.trial import Outcome, Trial, finished

_SCRIPT = Path("launch/slurm.sbatch")
_JOB = "slurm-job"


class Slurm:
    """Submits trials with launch/slurm.sbatch.

    Args:
        config: the YAML file that every trial starts from.
        folder: of the trials.
        metric: of the final evaluation.
        options: of sbatch, as one string.

    Raises:
        UserError: the script is not here.
    """

    def __init__(self, config: Path, folder: Path, metric: str, options: str) -> None:
        if not _SCRIPT.is_file():
            raise UserError(
                f"--sbatch submits {_SCRIPT}, which is not in this folder; call it in the project's folder."
            )
        self._config, self._folder, self._metric = config, folder, metric
        self._options = shlex.split(options)

    def run(self, source: Source, report: Callable[[Trial, Outcome], None]) -> None:
        """Submit what is neither done nor in the queue."""
        queued = _in_queue()
        while trial := source.take():
            report(trial, self._outcome(trial, queued))

    def _outcome(self, trial: Trial, queued: dict[str, str]) -> Outcome:
        folder = self._folder / trial.name
        if known := finished(folder, self._metric):
            return replace(known, earlier=True)
        folder.mkdir(parents=True, exist_ok=True)
        note = folder / _JOB
        if note.exists() and (job := note.read_text("utf-8").strip()) in queued:
            return Outcome("queued", reason=f"job {job}, {queued[job].lower()}")
        command = [
            "sbatch", "--parsable", f"--job-name={trial.name[:40]}", f"--output={folder}/slurm-%j.out", *self._options,
            str(_SCRIPT), "--config", str(self._config), *trial.overrides(folder),
        ]  # fmt: skip
        job = _call(command).split(";")[0].strip()
        note.write_text(job + "\n", "utf-8")
        return Outcome("queued", reason=f"job {job}, submitted now")


def _in_queue() -> dict[str, str]:
    """Return the state of this user's jobs by their number."""
    lines = _call(["squeue", "--me", "--noheader", "--format=%i %T"]).splitlines()
    return dict(line.split(maxsplit=1) for line in lines if line.strip())


def _call(command: list[str]) -> str:
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    except FileNotFoundError:
        raise UserError(f"--sbatch needs SLURM's {command[0]}, which is not on this machine.") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"--sbatch: {command[0]} did not answer within 2 minutes.") from None
    if result.returncode:
        raise UserError(f"--sbatch: {command[0]} said: {' '.join(result.stderr.split()) or result.returncode}.")
    return result.stdout
