"""Checkpoints on object storage: complete or absent, as on disk, although a store has no rename.

The manifest is the last object that is written and the first that is deleted. A prefix without one is no checkpoint:
nobody takes it for one, and the run that left it there clears it away. What is downloaded gets its name on disk when
all of it is there. One process of a run does all of this, rank 0: output_dir is shared, so it sees every rank's file.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from adalora_scale.checkpoint import format as files
from adalora_scale.checkpoint.errors import CheckpointError
from adalora_scale.checkpoint.format import MANIFEST_NAME
from adalora_scale.files import abandon, replace_text, sync, writing
from adalora_scale.store.client import Store

_NAME = re.compile(r"checkpoint-(\d+)")
_OWN = re.compile(r"pieces-\d{5,}-of-\d{5,}\.safetensors|trainer_state\.json")
"""What an upload that was cut off leaves; with anything else beside it a folder is somebody else's."""


def complete(store: Store) -> list[int]:
    """Return the steps of the complete checkpoints, the newest first.

    Raises:
        StoreError: the store cannot be listed.
    """
    found = [int(match.group(1)) for name in store.names() if (match := _NAME.fullmatch(name))]
    return sorted((step for step in found if MANIFEST_NAME in store.names(_name(step))), reverse=True)


def upload(store: Store, folder: Path, beside: list[Path]) -> bool:
    """Write a complete checkpoint to the store, the manifest last.

    Args:
        store: where to.
        folder: the checkpoint on disk; on the store its name is `checkpoint-<step>`.
        beside: files of the run that a continuation needs too; they are written before the manifest.

    Returns:
        Whether there was anything to write; False where the store has this very checkpoint.

    Raises:
        StoreError: the store did not take it.
        CheckpointError: the manifest on disk cannot be used.
        OSError: a file on disk cannot be read.
    """
    manifest, tree = folder / MANIFEST_NAME, files.read_manifest(folder)
    name = _name(tree["step"])  # folders are renamed; there the name is what tells
    there = store.read(f"{name}/{MANIFEST_NAME}")
    if there is not None and there == manifest.read_bytes():
        return False
    if there is not None:  # else it would say of half of each that it is whole
        store.remove(f"{name}/{MANIFEST_NAME}")
    for path in beside:
        store.put(path, path.name)
    for file in tree["files"]:
        store.put(folder / file, f"{name}/{file}")
    store.put(manifest, f"{name}/{MANIFEST_NAME}")
    return True


def fetch(store: Store, name: str, output_dir: Path, lines: tuple[str, ...]) -> Path:
    """Download a checkpoint: on disk it is complete or absent, too.

    Args:
        store: where from.
        name: the folder's name there, and on disk; what is on disk under it is renamed to `abandoned-…`.
        output_dir: where to.
        lines: files of lines beside the checkpoint, which come along where they are longer than those on disk.

    Raises:
        StoreError: it cannot be read.
        CheckpointError: it has no manifest, or one that cannot be used; or a file is not what the manifest says.
        UserError: the disk does not take it.
    """
    final, partial = output_dir / name, output_dir / f".{name}.partial"
    content = store.read(f"{name}/{MANIFEST_NAME}")
    if content is None:
        raise CheckpointError(f"{store}: {name} is not complete (it has no {MANIFEST_NAME}); name another checkpoint.")
    with writing(final):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            (partial / MANIFEST_NAME).write_bytes(content)
            for file in files.read_manifest(partial)["files"]:  # names without a path: the reader sees to that
                store.get(f"{name}/{file}", partial / file)
                sync(partial / file)
            sync(partial / MANIFEST_NAME)
            files.Checkpoint(partial).verify()
            for file in lines:
                _bring(store, file, output_dir)
            if final.exists() or final.is_symlink():
                abandon(final)
            files.publish(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return final


def rotate(store: Store, limit: int | None, best: str | None) -> None:
    """Delete the oldest complete checkpoints beyond `limit`, manifests first; never the newest, nor the best one.

    Raises:
        StoreError: one cannot be deleted.
    """
    if limit is None or limit < 1:
        return
    found = complete(store)
    protected = {step for step in found[:1]} | {step for step in found if _name(step) == best}
    spare = [step for step in found if step not in protected]
    for step in spare[max(limit - len(protected), 0) :]:
        remove(store, _name(step))


def remove(store: Store, name: str) -> None:
    """Delete a checkpoint; cut off in the middle, what is left is no longer taken for one.

    Raises:
        StoreError: it cannot be deleted.
    """
    store.remove(f"{name}/{MANIFEST_NAME}")
    store.remove_folder(name)


def set_aside(store: Store, step: int | None) -> list[str]:
    """Rename checkpoints that the run does not continue, and clear what a cut-off upload left.

    Args:
        store: where they are.
        step: what the run goes on from; None: it begins anew.

    Returns:
        The names that were set aside: to `abandoned-checkpoint-N`, by copying, since a store knows no rename.

    Raises:
        StoreError: one cannot be moved.
    """
    there, renamed = store.names(), []
    for name in sorted(name for name in there if _NAME.fullmatch(name)):
        number, inside = int(name.removeprefix("checkpoint-")), store.names(name)
        if MANIFEST_NAME not in inside:
            if inside and all(_OWN.fullmatch(file) for file in inside):
                store.remove_folder(name)
        elif step is None or number > step:
            target, count = f"abandoned-{name}", 1
            while target in there:
                count += 1
                target = f"abandoned-{name}-{count}"
            for file in sorted(inside, key=lambda file: file == MANIFEST_NAME):
                store.copy(f"{name}/{file}", f"{target}/{file}")
            remove(store, name)
            renamed.append(name)
    return renamed


def _bring(store: Store, name: str, output_dir: Path) -> None:
    """Take a file of lines from the store where it has more of them than the disk."""
    content, own = store.read(name), output_dir / name
    lines = own.read_bytes().count(b"\n") if own.is_file() else 0
    if content is not None and content.count(b"\n") > lines:
        replace_text(own, content.decode("utf-8", errors="replace"))


def _name(step: int) -> str:
    return f"checkpoint-{step}"
