"""The run's small files: JSON lines as training goes, run.json at the end."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from adalora_scale.files import replace_text, writing
from adalora_scale.installed import version_of

WRONG_END_NAME = "wrong-end.json"
"""Why a run ended without a result (`WrongEnd`); removed at the next start."""
_PACKAGES = ("adalora-scale", "torch", "transformers", "accelerate", "trl", "datasets", "deepspeed", "bitsandbytes")


class JsonLines:
    """A file of one JSON object a line; every line is on disk when `write` returns, so a crash loses nothing."""

    def __init__(self, path: Path, *, keep: int = 0, allowed: Callable[[], None] = lambda: None) -> None:
        """Open `path` for a run; a continued one keeps the first `keep` lines, those of steps it will not repeat.

        Args:
            path: the file.
            keep: how many of its lines stay.
            allowed: called before each line; what it raises keeps the line from being written.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._allowed = allowed
        kept = path.read_text(encoding="utf-8").splitlines(keepends=True)[:keep] if keep and path.exists() else []
        if kept and not kept[-1].endswith("\n"):
            kept.pop()  # the machine went down while it was written
        self.lines = len(kept)
        """Lines in the file."""
        replace_text(path, "".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        """Append `record`; numbers that JSON cannot hold (NaN, infinity) become null.

        Raises:
            UserError: the disk is full or the folder cannot be written any more.
        """
        self._allowed()
        line = json.dumps({key: _plain(value) for key, value in record.items()}) + "\n"
        with writing(self._path):
            before = self._path.stat().st_size if self._path.exists() else 0
            try:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError:
                with contextlib.suppress(OSError):
                    os.truncate(self._path, before)  # half a line is no JSON
                raise
        self.lines += 1

    def sync(self) -> None:
        """Wait until the lines are on disk.

        Raises:
            UserError: the disk could not take them.
        """
        with writing(self._path), self._path.open("a", encoding="utf-8") as file:
            os.fsync(file.fileno())


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a run's figures."""
    found = {"python": platform.python_version()}
    found |= {package: version_of(package) for package in _PACKAGES}
    found["torch"] = torch.__version__
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def hardware() -> dict[str, Any]:
    """Return what this process runs on."""
    found: dict[str, Any] = {"machine": platform.machine(), "cpu_count": os.cpu_count(), "device": "cpu"}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["device_memory_bytes"] = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return found


def peak_memory() -> dict[str, int]:
    """Return this process's peak memory in bytes: `resident_bytes`, and `device_bytes` where there is a GPU."""
    # Linux counts ru_maxrss in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    own = {"resident_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if torch.cuda.is_available():
        own["device_bytes"] = torch.cuda.max_memory_allocated()
    return own


def peak_memory_by_rank() -> list[dict[str, int]]:
    """Return every rank's peak resident and device memory in bytes; a collective call."""
    own = peak_memory()
    if not (dist.is_available() and dist.is_initialized()):
        return [own]
    everyone: list[dict[str, int]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, own)
    return everyone


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
