"""Which checkpoint a run goes on from: chosen by rank 0, verified by all ranks together, the same on all of them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist

from adalora_scale.checkpoint import format as files
from adalora_scale.checkpoint.format import Checkpoint, CheckpointError
from adalora_scale.checkpoint.writing import agree, rank_and_size
from adalora_scale.errors import UserError
from adalora_scale.files import abandon
from adalora_scale.messages import say

_NO_NEW_START = (
    "Starting anew would overwrite the run: move it away, or pass training.resume_from_checkpoint=false with "
    "training.overwrite_output_dir=true."
)
NOTHING_TO_RESUME = (
    "training.resume_from_checkpoint=true, but {} holds no complete checkpoint; with auto a run starts anew then."
)


def find_checkpoint(asked: str | bool | None, output_dir: Path) -> Checkpoint | None:
    """Return the verified checkpoint that `training.resume_from_checkpoint` asks for; a collective call.

    Args:
        asked: a folder; true for the newest complete one of output_dir; "auto" for the newest that is not damaged, or
            none at all; None or false to start anew.
        output_dir: the run's folder.

    Raises:
        CheckpointError: the folder is damaged, incomplete or of a newer version; with "auto" when none is left.
        UserError: there is no checkpoint to resume from.
    """
    if asked is None or asked is False:
        return None
    if asked is not True and asked != "auto":
        return _verified(Path(asked))
    found = _from_rank_0([str(path) for path in files.checkpoints(output_dir)])
    if not found:
        if asked is True:
            raise UserError(NOTHING_TO_RESUME.format(output_dir))
        unusable = _from_rank_0([str(path) for path in files.numbered(output_dir)])
        if unusable:
            raise CheckpointError(
                f"{unusable[-1]} has no manifest.json: it is half deleted, or holds an adapter alone "
                f"(training.save_only_model), which cannot be gone on from. {_NO_NEW_START}"
            )
        return None
    if asked is True:
        return _verified(Path(found[0]))
    problem = ""
    for path in found:
        try:
            return _verified(Path(path))
        except CheckpointError as error:
            problem = problem or str(error)
            if rank_and_size()[0] == 0:
                say(f"skipped: {error}")
    raise CheckpointError(
        f"no checkpoint of {output_dir} can be used, and starting anew would overwrite the run: {problem}"
    )


def set_aside(output_dir: Path, taken: Checkpoint | None) -> list[str]:
    """Rename checkpoints that the run does not continue and clear what a crash left of others; rank 0 calls it.

    A run that goes on from step 8 will write its own checkpoint-12; one from before, damaged or of a branch that is
    left, must not be found by the next `auto`. It is renamed to `abandoned-checkpoint-12`, not deleted; of a link the
    link is renamed. The one that the run goes on from stays, whatever its name says.

    Returns:
        The names that were set aside.
    """
    for partial in output_dir.glob(".checkpoint-*.partial"):
        shutil.rmtree(partial, ignore_errors=True)
    step = -1 if taken is None else int(taken.manifest["step"])
    renamed = []
    for path in files.numbered(output_dir):
        named = int(path.name.removeprefix("checkpoint-"))
        same = taken is not None and path.resolve() == taken.directory.resolve()
        if not same and max(named, files.step_of(path)) >= max(step, 0):
            abandon(path)
            renamed.append(path.name)
    return sorted(renamed)


def _verified(path: Path) -> Checkpoint:
    """Open a checkpoint on every rank; each verifies its share of the files."""
    rank, world_size = rank_and_size()

    def verify() -> Checkpoint:
        checkpoint = Checkpoint(path)
        checkpoint.verify(share_of(checkpoint, rank, world_size))
        return checkpoint

    opened: list[Checkpoint] = []
    agree(lambda: opened.append(verify()), path)
    return opened[0]


def share_of(checkpoint: Checkpoint, rank: int, world_size: int) -> list[str]:
    """Return what a rank verifies: of the ranks' files those that it will read, where worlds divide each other.

    Files with rows are read by the ranks that hold these now, the others (of HSDP's further copies) for random numbers.
    """
    saved, rows = checkpoint.world_size, checkpoint.holders
    begun, end = (len(rows) * place // world_size for place in (rank, rank + 1))
    mine = rows[begun:end] if len(rows) > world_size else rows[rank : rank + 1]
    mine += sorted(set(range(rank, saved, world_size)) - set(rows))
    own = [files.pieces_name(number, saved) for number in mine]
    if rank == 0:
        pieces = {files.pieces_name(number, saved) for number in range(saved)}
        own += [name for name in checkpoint.files if name not in pieces]
    return own


def _from_rank_0(value: Any) -> Any:
    if rank_and_size()[1] == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]
