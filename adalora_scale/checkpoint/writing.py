"""Writing a checkpoint with all ranks: complete or absent, and every rank learns which.

Rank 0 makes a hidden folder, every rank writes its own file there and waits until it is on disk, all tell each other
how it went, and only then rank 0 writes the manifest and gives the folder its name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from adalora_scale.checkpoint import format as files
from adalora_scale.checkpoint.draft import Draft
from adalora_scale.checkpoint.flat import flat_tensors
from adalora_scale.checkpoint.format import CheckpointError
from adalora_scale.checkpoint.state import Gathered
from adalora_scale.engines.ranks import everywhere, on_all_ranks, rank_and_size
from adalora_scale.errors import UserError
from adalora_scale.files import write_probe

_SETTLES_S = 20.0
"""How long a network file system may take to show one machine what another wrote."""


def write_checkpoint(
    output_dir: Path,
    step: int,
    gathered: Gathered,
    extras: Mapping[str, Tensor],
    content: Mapping[str, Any],
    texts: Mapping[str, str],
) -> Path:
    """Write `checkpoint-<step>`; every rank calls it, and it is complete when any of them returns.

    Args:
        output_dir: one shared folder.
        step: completed optimizer steps.
        gathered: this rank's pieces.
        extras: this rank's further tensors.
        content: rank 0's further entries of the manifest.
        texts: rank 0's further files, name → text.

    Raises:
        CheckpointError: the disk is full, the folder cannot be written, or ranks do not see the same folder. Raised on
            all ranks; nothing is left behind, and checkpoints from before are untouched.
    """
    draft = Draft.of(output_dir, step, gathered, content, texts)
    with discarded_when_failed(draft):
        open_folder(draft)
        everyone = agree(
            lambda: draft.write_own(flat_tensors(gathered.groups, draft.names, extras)),
            draft.own,
        )
        agree((lambda: draft.finish(everyone)) if draft.rank == 0 else None, draft.final)
    return draft.final


def open_folder(draft: Draft, then: Callable[[], None] = lambda: None) -> None:
    """Make the hidden folder on rank 0 and see it on every rank, which calls `then`; a collective call.

    Raises:
        CheckpointError: it cannot be made, a rank does not see it, or as `then`.
    """
    agree(draft.make_folder if draft.rank == 0 else None, draft.partial)

    def look() -> None:
        _must_see(draft.partial)
        then()

    agree(look, draft.partial)


@contextlib.contextmanager
def discarded_when_failed(draft: Draft) -> Iterator[None]:
    """Leave nothing of a checkpoint for which all ranks raise a CheckpointError inside."""
    try:
        yield
    except CheckpointError:
        # All ranks are here; none tells its user that nothing is left before it is so.
        agree(draft.discard if draft.rank == 0 else None, draft.partial)
        raise


def agree(action: Callable[[], Any] | None, path: Path) -> list[Any]:
    """Run `action` on this rank and return what it returned on every rank; a collective call.

    Raises:
        CheckpointError: it failed on some rank, with the operating system's reason; raised on all ranks alike.
    """

    try:
        return everywhere(lambda: tried(action, path))
    except UserError as error:
        raise on_all_ranks(CheckpointError(str(error))) from None


def tried(action: Callable[[], Any] | None, path: Path) -> Any:
    """Run `action` on this rank alone and return what it returned.

    Raises:
        UserError: the operating system refused it, with its reason.
    """
    try:
        return action() if action is not None else None
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}.") from None


def probe_shared(output_dir: Path) -> None:
    """See that every rank's output_dir is the same folder and takes its files, before hours are spent.

    A collective call.

    Raises:
        CheckpointError: a rank does not see what rank 0 wrote, or cannot write beside it.
    """
    rank = rank_and_size()[0]
    names: list[Any] = [f".probe-{socket.gethostname()}-{os.getpid()}"]

    def make_folder() -> None:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / names[0]).mkdir(exist_ok=True)

    agree(make_folder if rank == 0 else None, output_dir)
    if rank_and_size()[1] > 1:
        dist.broadcast_object_list(names, src=0)
    folder = output_dir / names[0]

    def write() -> None:
        _must_see(folder)
        try:
            write_probe(folder / f"{rank}")
        except OSError as error:
            raise UserError(
                f"training.output_dir={output_dir} cannot be written from {socket.gethostname()}: {error.strerror}."
            ) from None

    try:
        agree(write, output_dir)
    finally:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def rotate(output_dir: Path, limit: int | None, best: str | None, busy: Path | None = None) -> None:
    """Delete the oldest complete checkpoints beyond `limit`; never the newest, nor the best one. Rank 0 calls it.

    Half checkpoints don't count, so one of those can never push out the last good one.
    """
    if limit is None or limit < 1:
        return
    found = files.checkpoints(output_dir)
    protected = {found[0]} if found else set()
    if best is not None:
        protected |= {path for path in found if path.resolve() == Path(best).resolve()}
    spare = [path for path in found if path not in protected]
    for path in spare[max(limit - len(protected), 0) :]:
        if path != busy:  # it is being read; the next call takes it
            files.remove(path)


def _must_see(path: Path) -> None:
    deadline = time.monotonic() + _SETTLES_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{socket.gethostname()} does not see {path}, which rank 0 made: training.output_dir must be one file "
                f"system that all machines share."
            )
        time.sleep(0.05)
