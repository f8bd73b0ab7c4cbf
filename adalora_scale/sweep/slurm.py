"""Trials as SLURM jobs of their own: submitted once, and looked up in the queue by later calls."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from adalora_scale.errors import UserError
from adalora_scale.files import replace_text
from adalora_scale.sweep.search import Source
from adalora_scale.sweep.trial import SLURM_NOTE, Outcome, Trial, claimed, finished

_SCRIPT = Path("launch/slurm.sbatch")


class Slurm:
    """Submits trials with launch/slurm.sbatch.

    Args:
        config: the YAML file that every trial starts from.
        folder: of the trials.
        metric: of the final evaluation.
        options: of sbatch, as one string.
        resubmit: whether to submit again what left the queue without a result.

    Raises:
        UserError: the script is not here, or SLURM does not answer.
    """

    def __init__(self, config: Path, folder: Path, metric: str, options: str, *, resubmit: bool) -> None:
        if not _SCRIPT.is_file():
            raise UserError(
                f"--sbatch submits {_SCRIPT}, which is not in this folder; call it in the project's folder."
            )
        self._config, self._folder, self._metric = config, folder, metric
        self._options, self._resubmit = shlex.split(options), resubmit
        self._queued = _in_queue()

    def run(self, source: Source, report: Callable[[Trial, Outcome], None]) -> bool:
        """Submit what is neither done nor in the queue; return whether the source has no more, as it always has."""
        while trial := source.take():
            report(trial, self._outcome(trial))
        return True

    def _outcome(self, trial: Trial) -> Outcome:
        folder = self._folder / trial.name
        with claimed(trial, folder) as lock:
            if known := finished(folder, self._metric):
                return replace(known, earlier=True)
            if lock is None:
                return Outcome("running elsewhere", reason="another process trains in its folder")
            note = folder / SLURM_NOTE
            job = note.read_text("utf-8").strip() if note.exists() else ""
            if job in self._queued:
                return Outcome("queued", reason=f"job {job}, {self._queued[job].lower()}")
            if job and not self._resubmit:
                said = f"job {job} left the queue without a result, see {folder}/slurm-{job}.out; --resubmit goes on"
                return Outcome("failed", reason=said)
            command = [
                "sbatch", "--parsable", f"--job-name={trial.name[:40]}", f"--output={folder}/slurm-%j.out",
                *self._options, str(_SCRIPT), "--config", str(self._config), *trial.overrides(folder),
            ]  # fmt: skip
            job = _call(command).split(";")[0].strip()
            replace_text(note, job + "\n")
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
