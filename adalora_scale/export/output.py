"""The folder an export writes: refused when it holds something, complete or absent, never half.

What an earlier call wrote there is replaced with `--overwrite`, and nothing else: `record.py` says what that is,
`publishing.py` how it is replaced.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from adalora_scale.errors import Unsupported, UserError, system_reason
from adalora_scale.export.publishing import discard, names_beside, publish, tidy
from adalora_scale.export.record import REPORT_NAME, remove_written, why_kept
from adalora_scale.files import require_local, sync_tree, writing
from adalora_scale.messages import say
from adalora_scale.reading.folders import own_file

TOKENIZER_FILES = (
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


class Withdrawn(Exception):
    """Raised inside `output_folder` when what was written is not to be published; goes no further.

    Args:
        kept: a free name that the folder gets instead; None: it goes.
    """

    def __init__(self, kept: Path | None = None) -> None:
        super().__init__()
        self.kept = kept


def aside(target: Path) -> Path:
    """Return a free name beside a folder for what is not to stand at its own: `OUT.unfaithful`, or with a number."""
    target = Path(os.path.abspath(target))
    names = (f"{target.name}.unfaithful{number}" for number in ("", *(f"-{count}" for count in range(2, 1000))))
    return next(target.with_name(name) for name in names if not os.path.lexists(target.with_name(name)))


@contextlib.contextmanager
def output_folder(target: Path, *, overwrite: bool, inputs: Sequence[Path], needed_bytes: int = 0) -> Iterator[Path]:
    """Give a temporary folder beside `target` that takes its place when the block ends without an error.

    The block ends with `write_record`. What is measured inside is measured before anything is replaced.

    Args:
        target: the folder to write.
        overwrite: replace what an earlier call wrote there.
        inputs: folders that are read and must survive.
        needed_bytes: room that the result takes on disk.

    Raises:
        UserError: the folder holds something, cannot be written, or the disk is too small.
    """
    require_local("OUT", target)
    target = Path(os.path.abspath(target))
    partial, _ = names_beside(target)
    try:
        for line in tidy(target):
            _say(line)
        _check_target(target, overwrite, inputs)
        target.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(target.parent).free
        if free < needed_bytes:
            raise UserError(f"{target} needs {needed_bytes:,} bytes, the disk has {free:,} left; name another disk.")
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}; name another folder.") from None
    try:
        yield partial
        if not (partial / REPORT_NAME).is_file():
            raise RuntimeError(f"nothing in {partial} says what was written; call write_record last")
        sync_tree(partial)
        _check_target(target, overwrite, inputs)  # what took an hour to write left an hour to put something there
        earlier = publish(partial, target)
    except (UserError, Unsupported):
        raise
    except Withdrawn as withdrawn:
        if withdrawn.kept is not None:
            with writing(withdrawn.kept):
                sync_tree(partial)
                publish(partial, withdrawn.kept)
        return
    except Exception as error:  # the writers of safetensors and tokenizers are Rust's and raise no OSError
        if (reason := system_reason(error)) is None:
            raise
        raise UserError(f"writing {target} failed: {reason}. Nothing was left behind; write to another disk.") from None
    else:
        if earlier is not None and not remove_written(earlier):
            _say(f"{earlier} stays: what was at {target} before, and something that came in meanwhile")
    finally:
        if partial.exists():
            discard(partial)


def copy_tokenizer(source: Path, target: Path) -> bool:
    """Copy the tokenizer's files and return whether there were any.

    Raises:
        UserError: one leads out of the folder.
    """
    found = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in found:
        shutil.copyfile(own_file(source / name, source), target / name)
    return bool(found)


def _check_target(target: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    if target.is_symlink():
        raise UserError(f"{target} is a link (to {os.readlink(target)}); name a folder itself to write.")
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file; name a folder to write.")
    if not target.exists() or not any(target.iterdir()):
        return
    for source in inputs:
        if overwrite and source.resolve().is_relative_to(target.resolve()):
            raise UserError(f"--overwrite would delete {source}, which is read; name another folder to write.")
    reason = why_kept(target)
    if not overwrite:
        way_out = "or pass --overwrite" if reason is None else f"--overwrite leaves it alone, because it {reason}"
        raise UserError(f"{target} holds something already; name another folder, {way_out}.")
    if reason is None and Path.cwd().resolve().is_relative_to(target.resolve()):
        reason = "is the working folder"
    if reason is not None:
        raise UserError(
            f"{target} {reason}; --overwrite leaves it alone. Name another folder, or remove it by hand if all of it "
            f"can go."
        )


def _say(line: str) -> None:
    say(f"note: {line}", to=sys.stderr)
