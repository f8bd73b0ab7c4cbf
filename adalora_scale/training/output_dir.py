"""A run's folder, from before everything that takes time: not another run's, writable, and held by this run alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adalora_scale.errors import UserError
from adalora_scale.files import require_local, write_probe
from adalora_scale.process_rank import process_rank
from adalora_scale.report.names import LINE_FILES, RUN_NAME
from adalora_scale.training.lease import Lease, held
from adalora_scale.training.output_store import TO_A_STORE, check_keys, check_output_store
from adalora_scale.training.stopping import stopping

_RUN_FILES = (RUN_NAME, *LINE_FILES, "adapter_config.json", "adapter_model.safetensors")


@contextlib.contextmanager
def hold_output_dir(training: Mapping[str, Any]) -> Iterator[Lease | None]:
    """Hold a run's output_dir while inside, on rank 0, which alone writes there; signals leave their note in it.

    A folder that was made for it and is empty at the end goes with it.

    Args:
        training: the config's section; one without output_dir cannot run, and whoever reads it says so.

    Raises:
        UserError: it holds another run, another run holds it, or it cannot be written.
    """
    output_dir = training.get("output_dir")
    if not isinstance(output_dir, str):
        yield None
        return
    require_local("training.output_dir", output_dir, TO_A_STORE)
    check_keys(training)
    directory = Path(output_dir).expanduser()  # as TrainingArguments does
    stopping.directory = directory
    if process_rank() != 0:
        with stopping.noting():
            yield None
        return
    if directory.exists() and not directory.is_dir():
        raise UserError(f"training.output_dir={directory} is a file; name a folder.")
    new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"training.output_dir={directory} cannot be written: {error.strerror}.") from None
    try:
        with stopping.noting(), held(directory) as lease:
            anew = _check(directory, training)
            stopping.anew = check_output_store(training, _RUN_FILES) or anew
            stopping.held = True
            stopping.forget_asked()
            with stopping.noting():  # while the folder is held
                yield lease
    finally:
        stopping.held = False
        if new:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _check(directory: Path, training: Mapping[str, Any]) -> bool:
    """Refuse to mix two runs in one folder, or to train for one that takes no files.

    Returns:
        Whether another run is in the folder, which this one is not going to continue.
    """
    found = [name for name in _RUN_FILES if (directory / name).exists()]
    found += [path.name for path in directory.glob("checkpoint-*")]
    if found and not training.get("overwrite_output_dir", False) and not training.get("resume_from_checkpoint"):
        raise UserError(
            f"training.output_dir={directory} holds another run ({found[0]}). Go on with it by "
            f"training.resume_from_checkpoint=auto, choose another folder, or pass training.overwrite_output_dir=true."
        )
    try:
        probe = directory / ".write-probe"
        write_probe(probe)
        probe.unlink()
    except OSError as error:
        raise UserError(f"training.output_dir={directory} cannot be written: {error.strerror}.") from None
    return bool(found) and not training.get("resume_from_checkpoint")
