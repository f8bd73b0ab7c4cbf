"""The folder an export writes: refused when it holds something, complete or absent, never half."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adalora_scale.errors import UserError

REPORT_NAME = "export.json"
_EXPORT_FILES = (REPORT_NAME, "adapter_config.json", "config.json")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
)


@contextlib.contextmanager
def output_folder(target: Path, *, overwrite: bool, inputs: Sequence[Path], needed_bytes: int = 0) -> Iterator[Path]:
    """Give a temporary folder beside `target` that takes its place when the block ends without an error.

    Args:
        target: the folder to write.
        overwrite: replace what an earlier export wrote there.
        inputs: folders that are read and must survive.
        needed_bytes: room that the result takes on disk.

    Raises:
        UserError: the folder holds something, cannot be written, or the disk is too small.
    """
    target = target.absolute()
    _check_target(target, overwrite, inputs)
    temporary, replaced = (target.with_name(f".{target.name}.{kind}-{os.getpid()}") for kind in ("partial", "replaced"))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed_bytes:
            raise UserError(f"{target} needs {needed_bytes:,} bytes, the disk has {free:,} left; name another disk.")
        temporary.mkdir()
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}.") from None
    try:
        yield temporary
        if target.exists():
            os.rename(target, replaced)
        os.rename(temporary, target)
    except OSError as error:
        raise UserError(f"writing {target} failed: {error.strerror or error}. Nothing was left behind.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if target.exists():
            shutil.rmtree(replaced, ignore_errors=True)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write `export.json`; it appears complete or not at all."""
    temporary = folder / f".{REPORT_NAME}.partial"
    temporary.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, folder / REPORT_NAME)


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer's files and return whether there were any."""
    found = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, target / name)
    return bool(found)


def _check_target(target: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    if target.is_file():
        raise UserError(f"{target} is a file; name a folder to write.")
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target} holds something already; name another folder, or pass --overwrite.")
    for source in inputs:
        if source.resolve().is_relative_to(target.resolve()):
            raise UserError(f"--overwrite would delete {source}, which is read; name another folder to write.")
    if target.resolve() in Path.cwd().resolve().parents or not any((target / name).is_file() for name in _EXPORT_FILES):
        raise UserError(f"{target} does not look like an exported adapter or model; --overwrite leaves it alone.")
