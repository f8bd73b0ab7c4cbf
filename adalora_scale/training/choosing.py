"""Which checkpoint a run goes on from: on the disk or on a store, and what of that is known before the model loads."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from adalora_scale.checkpoint.finding import NOTHING_TO_RESUME, find_checkpoint
from adalora_scale.checkpoint.format import Checkpoint, checkpoints, read_manifest
from adalora_scale.checkpoint.writing import agree, probe_shared, rank_and_size
from adalora_scale.errors import UserError
from adalora_scale.files import is_url
from adalora_scale.training.output_store import bring, require_same_run_there


def check_asked_checkpoint(asked: str | bool | None, output_dir: Path, *, store: str | None = None) -> None:
    """See before the model is loaded that there is something to resume from on disk; no collective.

    Raises:
        UserError: there is no such checkpoint, or its manifest is damaged or of a newer version.
    """
    if asked is True and store is None:
        if not (found := checkpoints(output_dir)):
            raise UserError(NOTHING_TO_RESUME.format(output_dir))
        read_manifest(found[0])
    elif isinstance(asked, str) and asked != "auto" and not is_url(asked):
        read_manifest(str(asked))


def choose_checkpoint(
    asked: str | bool | None, output_dir: Path, *, store: str | None = None, allowed: Collection[str] = ()
) -> Checkpoint | None:
    """Decide what a run goes on from; a collective call.

    Args:
        asked: as `find_checkpoint` takes it; or a checkpoint's URL.
        output_dir: the run's folder.
        store: `training.output_store`, whose newest checkpoint is downloaded where it is the newest of all.
        allowed: `training.resume_allow_changed`.

    Raises:
        UserError: as `find_checkpoint`; output_dir is not the same folder on all ranks, the store cannot be read, or it
            holds another run.
    """
    probe_shared(output_dir)
    first = rank_and_size()[0] == 0
    if (wanted := asked) and (store is not None or is_url(str(asked))):
        asked = agree((lambda: bring(wanted, output_dir, store)) if first else None, output_dir)[0]
    chosen = find_checkpoint(asked, output_dir)
    if chosen is not None and store is not None:
        identity = chosen.manifest["identity"]
        agree((lambda: require_same_run_there(store, identity, allowed)) if first else None, output_dir)
    return chosen
