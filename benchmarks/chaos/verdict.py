"""What a round's end is worth: compared with the undisturbed run, checkpoint by checkpoint, file by file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.chaos.folder import (
    ALLOCATIONS,
    MANIFEST,
    METRICS,
    WEIGHTS,
    checkpoints,
    faults,
    inode,
    records,
)
from benchmarks.chaos.starts import Ending


class Failed(Exception):
    """The toolkit did what it must not do; the message says what."""


@dataclass(frozen=True)
class Damage:
    """What an attack did to a checkpoint."""

    step: int
    file: str
    how: str


def differences(undisturbed: Path, folder: Path) -> list[str]:
    """Return the files of a finished run that are not those of the undisturbed one, bit for bit, clocks aside."""
    found = []
    for name in (WEIGHTS, METRICS, ALLOCATIONS):
        one, other = undisturbed / name, folder / name
        read = Path.read_bytes if name == WEIGHTS else records
        if not other.exists():
            found.append(f"{name} is not there")
        elif read(one) != read(other):
            found.append(f"{name} differs")
    return found


def require_whole(undisturbed: Path, folder: Path, damaged: Mapping[int, Damage]) -> None:
    """See that every checkpoint which no attack damaged is what the undisturbed run wrote at that step.

    Args:
        damaged: inode of a checkpoint's folder → what was done to it.

    Raises:
        Failed: one is not whole, or holds something else.
    """
    for step, path in checkpoints(folder).items():
        if inode(path) in damaged:
            continue
        like = undisturbed / path.name
        if found := faults(path, like if like.is_dir() else None):
            raise Failed(f"checkpoint-{step} was left alone by the attacks, but {'; '.join(found)}")


def require_named(ending: Ending, damaged: Mapping[int, Damage], *, present: Mapping[int, int]) -> None:
    """See that a start which chose a checkpoint named the damaged ones that it passed over, and used none of them.

    Args:
        damaged: inode → what was done.
        present: step → inode of the checkpoints that lay there when the start began, without a manifest too.

    Raises:
        Failed: a damaged checkpoint was used, or passed over without a word.
    """
    if ending.resumed is None and not ending.trained:
        return
    whole = max((step for step, number in present.items() if number not in damaged), default=0)
    chosen = whole if ending.resumed is None else ending.resumed
    named = [line for line in ending.text.splitlines() if "resumed from" not in line]
    for step, number in present.items():
        if number not in damaged or step < chosen:
            continue
        damage = damaged[number]
        what = f"checkpoint-{step}, whose {damage.file} was {damage.how}"
        if chosen == step:
            raise Failed(f"it went on from {what}")
        # Without its manifest a folder is no checkpoint, as after a kill in the middle of its deletion.
        silent = damage.file == MANIFEST and damage.how == "removed" and chosen > 0
        if not silent and not any(f"checkpoint-{step}" in line for line in named):
            raise Failed(f"it went on from step {chosen} without a word on {what}")


def require_reason(ending: Ending, words: list[str]) -> str:
    """Return the line of a refused start, which must name something that the attacks did.

    Raises:
        Failed: it names nothing of it.
    """
    line = ending.errors[0]
    if not any(word in line for word in words):
        raise Failed(f"refused, but for nothing that the attacks did: {line}")
    return line
