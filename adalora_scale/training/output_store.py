"""`training.output_store` before training: may this run write there, and what is there to go on from.

The run works in its output_dir; the store gets copies (`uploading.py`). Rank 0 alone talks to it.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from adalora_scale.errors import UserError
from adalora_scale.files import is_url
from adalora_scale.messages import say
from adalora_scale.report.names import LINE_FILES
from adalora_scale.store.address import check_address
from adalora_scale.store.client import Store

KEY = "training.output_store"
TO_A_STORE = f", and the store as {KEY}"
"""What `require_local` says of a URL in output_dir."""
RESUME_KEY = "training.resume_from_checkpoint"
OWNER_NAME = ".run"
"""The object that says which start of which run wrote there last."""
FETCHED_NAME = ".resumed"
"""The folder in output_dir for a checkpoint of another run's store; it goes when training ends."""


def check_keys(training: Mapping[str, Any]) -> None:
    """See that the keys that may hold a URL hold one that can be used; asks nobody.

    Raises:
        UserError: one does not.
    """
    if isinstance(url := training.get("output_store"), str):
        check_address(KEY, url)
    asked = training.get("resume_from_checkpoint")
    if isinstance(asked, str) and is_url(asked):
        check_address(RESUME_KEY, asked)
        if not asked.rstrip("/").rpartition("/")[2].removeprefix("checkpoint-").isdecimal():
            raise UserError(
                f"{RESUME_KEY}={asked} is no checkpoint; name one, as {asked.rstrip('/')}/checkpoint-400, or set {KEY} "
                f"and resume with auto."
            )


def check_output_store(training: Mapping[str, Any], run_files: Collection[str]) -> bool:
    """Try the store, and refuse to mix two runs on it; one process calls it, before anything takes time.

    Args:
        training: the config's section.
        run_files: names that a run leaves.

    Returns:
        Whether another run is there, which this one is not going to continue.

    Raises:
        UserError: the store cannot be reached or written, or holds another run; or the checkpoint that is asked for is
            not on its store.
    """
    check_keys(training)
    asked = training.get("resume_from_checkpoint")
    if isinstance(asked, str) and is_url(asked):
        folder, name = _parent(asked)
        if Store(RESUME_KEY, folder).read(f"{name}/manifest.json") is None:
            raise UserError(f"{RESUME_KEY}={asked} is not there or not complete (it has no manifest.json).")
    if (url := training.get("output_store")) is None:
        return False
    store = Store(KEY, url)
    store.probe()
    there = store.names()
    found = [name for name in run_files if name in there] + [name for name in there if name.startswith("checkpoint-")]
    if found and not training.get("overwrite_output_dir", False) and not asked:
        raise UserError(
            f"{store} holds another run ({found[0]}). Go on with it by {RESUME_KEY}=auto, choose another folder, or "
            f"pass training.overwrite_output_dir=true."
        )
    return bool(found) and not asked


def bring(asked: str | bool, output_dir: Path, url: str | None) -> str | bool:
    """Download what a run goes on from, where it is on a store; rank 0 calls it.

    Args:
        asked: `training.resume_from_checkpoint`.
        output_dir: the run's folder.
        url: `training.output_store`.

    Returns:
        What is asked for of the disk then.

    Raises:
        StoreError: the store cannot be read.
        CheckpointError: the checkpoint that is asked for is damaged there.
        UserError: the disk does not take it.
    """
    from adalora_scale.checkpoint import stored

    forget_fetched(output_dir)
    if isinstance(asked, str) and is_url(asked):
        folder, name = _parent(asked)
        own = url is not None and folder == url.rstrip("/")
        say(f"downloading {asked}")
        target = output_dir if own else output_dir / FETCHED_NAME
        store = Store(RESUME_KEY, folder)
        fetched = stored.fetch(store, name, target, LINE_FILES)
        _bring_best(store, fetched)
        return str(fetched)
    if url is not None and (asked is True or asked == "auto"):
        _bring_newest(Store(KEY, url), output_dir, damaged_too=asked is True)
    return asked


def forget_fetched(output_dir: Path) -> None:
    """Delete what a run went on from of another run's store."""
    shutil.rmtree(output_dir / FETCHED_NAME, ignore_errors=True)


def _bring_newest(store: Store, output_dir: Path, *, damaged_too: bool) -> None:
    """Download the newest complete checkpoint, unless the disk has a newer one that can be used."""
    from adalora_scale.checkpoint import stored
    from adalora_scale.checkpoint.format import Checkpoint, CheckpointError, checkpoints, step_of

    newest = -1
    for path in checkpoints(output_dir):
        try:
            if not damaged_too:
                Checkpoint(path).verify()
        except CheckpointError:
            continue  # `find_checkpoint` says so where it is not replaced
        newest = step_of(path)
        break
    for step in stored.complete(store):
        if step <= newest:
            return
        name = f"checkpoint-{step}"
        say(f"downloading {store.url}/{name}")
        try:
            _bring_best(store, stored.fetch(store, name, output_dir, LINE_FILES))
        except CheckpointError as error:
            if damaged_too:
                raise
            say(f"skipped: {store.url}/{name}: {error}")
            continue
        return


def _bring_best(store: Store, fetched: Path) -> None:
    """Download the best checkpoint so far beside one that was downloaded, where the store has it and the disk not."""
    from adalora_scale.checkpoint import stored
    from adalora_scale.checkpoint.format import MAX_TRAINER_STATE
    from adalora_scale.reading.json_text import read_object

    state = read_object(fetched / "trainer_state.json", limit=MAX_TRAINER_STATE, finite=False)
    said = state.get("best_model_checkpoint")
    name = Path(said).name if isinstance(said, str) else ""
    if not name or (fetched.parent / name).exists() or name not in map("checkpoint-{}".format, stored.complete(store)):
        return
    say(f"downloading {store.url}/{name}, the best so far")
    stored.fetch(store, name, fetched.parent, ())


def require_same_run_there(url: str, identity: Mapping[str, Any], allowed: Collection[str]) -> None:
    """Compare what a run goes on from with the newest checkpoint on its store; rank 0 calls it.

    Args:
        url: `training.output_store`.
        identity: key → value of what the run goes on from, as its manifest has it.
        allowed: keys that may differ.

    Raises:
        UserError: the store holds the checkpoints of another run.
    """
    from adalora_scale.checkpoint import stored
    from adalora_scale.reading.json_text import parse_json

    store = Store(KEY, url)
    for step in stored.complete(store)[:1]:
        place = f"{store.url}/checkpoint-{step}/manifest.json"
        tree = parse_json(store.read(f"checkpoint-{step}/manifest.json") or b"{}", Path(place), finite=False)
        there = tree.get("identity") if isinstance(tree, dict) else None
        there = there if isinstance(there, dict) else {}
        for key in identity:
            if key in there and there[key] != identity[key] and key not in allowed:
                raise UserError(
                    f"{store} holds checkpoints of another run ({key}: {there[key]} there, {identity[key]} here), "
                    f"which this one would replace; name another folder on the store."
                )


def _parent(url: str) -> tuple[str, str]:
    folder, _, name = url.rstrip("/").rpartition("/")
    return folder, name
