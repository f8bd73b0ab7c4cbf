"""What a run that goes on brings along beside its checkpoint: the lines of its history, the best checkpoint so far."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path

from adalora_scale.files import abandon, replace_text


def bring_lines(source: Path, output_dir: Path, kept: Mapping[str, int], step: int) -> list[str]:
    """See that output_dir has the lines of the steps before a checkpoint, and no others; rank 0 calls it.

    Args:
        source: the folder that the checkpoint lies in; lines come from there where it is another one and has some.
            What was in output_dir under their name is renamed to `abandoned-…`.
        output_dir: the run's folder.
        kept: file → how many lines it had when the checkpoint was written.
        step: the checkpoint's.

    Returns:
        What cannot be brought, a sentence a file.

    Raises:
        UserError: the lines do not fit on the disk.
    """
    missing = []
    elsewhere = source.resolve() != output_dir.resolve()
    for name, count in kept.items():
        lines = _lines_before(source / name, count, step) if elsewhere else []
        own = _lines_before(output_dir / name, count, step)
        if lines and lines != own:
            if (output_dir / name).exists():
                abandon(output_dir / name)
            replace_text(output_dir / name, "".join(lines))
            own = lines
        if len(own) < count:
            if (output_dir / name).exists():
                replace_text(output_dir / name, "".join(own))
            missing.append(f"{output_dir / name} has {len(own)} of the {count} lines before this checkpoint")
    return missing


def best_so_far(said: str | None, places: list[Path]) -> str | None:
    """Return where a run's best checkpoint is now: folders are copied and moved, with the paths that files tell.

    Args:
        said: where it was.
        places: folders in which it may lie now, the likeliest first.
    """
    if said is None:
        return None
    found = [folder / Path(said).name for folder in places]
    return next((str(path) for path in [*found, Path(said)] if path.is_dir()), None)


def _lines_before(path: Path, count: int, step: int) -> list[str]:
    """Return the first `count` lines that were written before a checkpoint.

    A file that was lost begins with lines of later steps, which the run will write again: a number of lines alone
    would keep those. Of fewer lines than there were, those of the checkpoint's own step may have come after it.
    """
    if not path.is_file():
        return []
    lines = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    before = list(itertools.takewhile(lambda line: _step(line) <= step, lines[:count]))
    return before if len(before) == count else [line for line in before if _step(line) < step]


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError, RecursionError):  # damaged: nothing behind it counts
        return math.inf
