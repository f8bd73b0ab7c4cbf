"""One trial: an ordinary run in a folder of its own, and what is known of it from that folder alone."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adalora_scale.errors import UserError
from adalora_scale.sweep.space import Settings

State = Literal["done", "failed", "stopped", "queued", "running elsewhere"]


@dataclass(frozen=True)
class Trial:
    """Values to train with."""

    settings: Settings
    seed: int
    again: bool = False
    """Whether it is the winner on one more seed."""

    @property
    def name(self) -> str:
        """Return the folder's name: the values for people, a digest for what the values' text leaves out."""
        words = [f"{key.rsplit('.', 1)[-1]}-{value}" for key, value in self.settings] or ["config"]
        readable = re.sub(r"[^A-Za-z0-9.+-]+", "-", "_".join([*words, f"seed-{self.seed}"]))[:100]
        digest = hashlib.sha256(json.dumps([self.settings, self.seed]).encode()).hexdigest()[:6]
        return f"{readable}-{digest}"

    def __str__(self) -> str:
        """Return what progress says."""
        words = [f"{key}={value}" for key, value in self.settings] or ["the config as it is"]
        return " ".join([*words, f"seed {self.seed}"] if self.again else words)

    def overrides(self, folder: Path) -> list[str]:
        """Return the run's overrides; one that was stopped goes on from its last checkpoint."""
        return [
            *(f"{key}={value}" for key, value in self.settings),
            f"training.seed={self.seed}",
            f"training.output_dir={folder}",
            "training.overwrite_output_dir=false",
            "training.resume_from_checkpoint=auto",
        ]


@dataclass(frozen=True)
class Outcome:
    """What a trial came to."""

    state: State
    value: float | None = None
    """The metric; None unless it is done, and infinitely bad is NaN."""
    spent: str = ""
    """What is left of the adapter, with its unit."""
    seconds: float | None = None
    reason: str = ""
    """Why there is no value."""
    earlier: bool = False
    """Whether an earlier call of the sweep ran it."""


def finished(folder: Path, metric: str) -> Outcome | None:
    """Read a finished run's figures; None where there is none.

    Raises:
        UserError: the final evaluation has no such metric.
    """
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
    return Outcome("done", value, spent, summary["wall_time_s"])
