"""What lies in a run's folder, read without the toolkit: a check must not ask what it checks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
WEIGHTS = "adapter_model.safetensors"
METRICS = "metrics.jsonl"
ALLOCATIONS = "ranks.jsonl"

_NOT_COMPARED = ("runtime", "per_second", "total_flos")
"""What the clock decides, and transformers' count of operations: a float32 sum over ranks that is taken at each
checkpoint, and rounds otherwise where a signal adds one."""


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return step → checkpoint that has a manifest, the newest first."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and (path / MANIFEST).is_file():
            found[int(number)] = path
    return dict(sorted(found.items(), reverse=True))


def newest_whole(folder: Path, damaged: Container[int] = ()) -> int:
    """Return the highest step of a checkpoint that nobody damaged (`damaged`: inodes of folders), 0 for none."""
    steps = (step for step, path in checkpoints(folder).items() if inode(path) not in damaged)
    return next(steps, 0)


def partials(folder: Path) -> list[str]:
    """Return the checkpoints in the making."""
    return [path.name for path in folder.glob(".checkpoint-*.partial")]


def inode(path: Path) -> int:
    """Return what stays the same when a folder is renamed; 0 where there is none."""
    try:
        return path.stat().st_ino
    except OSError:
        return 0


def faults(checkpoint: Path, like: Path | None) -> list[str]:
    """Return what is wrong with a checkpoint.

    Args:
        checkpoint: the folder.
        like: the undisturbed run's checkpoint of the same step; its pieces must be the same bytes.
    """
    try:
        content = (checkpoint / MANIFEST).read_bytes()
        manifest = json.loads(content)
        own = manifest["checksum"]
        listed = {name: entry["sha256"] for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError) as error:
        return [f"{checkpoint.name}/{MANIFEST}: {error!r}"]
    found = []
    if hashlib.sha256(re.sub(re.escape(own).encode(), b"0" * 64, content, count=1)).hexdigest() != own:
        found.append(f"{checkpoint.name}/{MANIFEST} is damaged")
    for name, digest in listed.items():
        path = checkpoint / name
        if not path.is_file():
            found.append(f"{checkpoint.name}/{name} is missing")
        elif hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            found.append(f"{checkpoint.name}/{name} is damaged")
        elif like is not None and name.startswith("pieces-") and path.read_bytes() != (like / name).read_bytes():
            found.append(f"{checkpoint.name}/{name} is not what the undisturbed run wrote")
    return found


def records(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines without what the clock decides; none where there is no file."""
    if not path.exists():
        return []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(word in k for word in _NOT_COMPARED)} for row in rows]
