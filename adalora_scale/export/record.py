"""`export.json`: what was done, and which files of the folder were written; nothing else there may be replaced."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from adalora_scale.errors import UserError
from adalora_scale.files import replace_text
from adalora_scale.installed import version_of
from adalora_scale.reading.checksums import file_checksum
from adalora_scale.reading.json_text import read_object
from adalora_scale.reading.written import RECORD_NAME, TOOL
from adalora_scale.report.names import LINE_FILES, RUN_NAME

REPORT_NAME = RECORD_NAME
_RUN_FILES = (RUN_NAME, *LINE_FILES)
_HASHED = 2**20  # bytes: what people edit by hand is small; reading 140 GB again takes minutes
_SHOWN = 3


def write_record(folder: Path, report: dict[str, Any], *, every_digest: bool = False) -> dict[str, Any]:
    """Write `export.json` as the last file of a folder, and return what it holds.

    Beside the report these are the tool, its version, and every file of the folder with its size (small ones also with
    their SHA-256): `written`, relative name → {bytes, sha256}.

    Args:
        folder: complete but for its record.
        report: what was done.
        every_digest: give large files their SHA-256 too: a base that is read far more often than written.

    Raises:
        UserError: the disk is full.
    """
    files = {name: _entry(folder / name, every_digest) for name in sorted(_contents(folder)) if name != REPORT_NAME}
    content = {**report, "tool": TOOL, "tool_version": version_of(TOOL), "written": files}
    replace_text(folder / REPORT_NAME, json.dumps(content, indent=2) + "\n")
    return content


def why_kept(folder: Path) -> str | None:
    """Say why a folder must not be replaced; None: this tool wrote all that is in it, and it is as it was written."""
    written = _written(folder)
    if isinstance(written, str):
        return written
    names = _contents(folder)
    foreign = [name for name in names if name not in written and name != REPORT_NAME]
    if foreign:
        return f"holds what its {REPORT_NAME} does not list ({_some(foreign)})"
    changed = [name for name in names if name != REPORT_NAME and not _is_as_written(folder / name, written[name])]
    return f"was changed since it was written ({_some(changed)})" if changed else None


def remove_written(folder: Path) -> bool:
    """Delete the files that the folder's record lists, the record last, then the folder; return whether it is gone.

    What is not listed stays, and the folder and its record with it. Links are never followed.
    """
    if not os.listdir(folder):  # killed here before
        folder.rmdir()
        return True
    written = _written(folder)
    if isinstance(written, str):
        return False
    for name in _contents(folder):
        if name in written and _is_plain(folder / name):
            (folder / name).unlink()
    for directory, _, _ in sorted(os.walk(folder), reverse=True):
        if directory != str(folder) and not os.listdir(directory):
            os.rmdir(directory)
    if os.listdir(folder) != [REPORT_NAME]:
        return False
    (folder / REPORT_NAME).unlink()
    folder.rmdir()
    return True


def _written(folder: Path) -> dict[str, Any] | str:
    """Return the files that the record lists, or why there is no such list."""
    path = folder / REPORT_NAME
    if not _is_plain(path):
        runs = [*(name for name in _RUN_FILES if (folder / name).exists()), *folder.glob("checkpoint-*")]
        return "is a run's output_dir" if runs else f"holds no {REPORT_NAME} of {TOOL}, which wrote none of it"
    try:
        content = read_object(path)
    except UserError:
        content = {}
    if not content or (content.get("tool") != TOOL and "format" not in content):
        return f"holds an {REPORT_NAME} that {TOOL} did not write"
    if "tool" not in content:
        return f"was written by an earlier version of {TOOL}, whose {REPORT_NAME} does not list the files"
    written = content.get("written")
    if not isinstance(written, dict) or not all(isinstance(entry, dict) for entry in written.values()):
        return f"holds an {REPORT_NAME} without a list of files"
    return written


def _contents(folder: Path) -> list[str]:
    """Return everything below a folder but plain folders that hold something, relative; no link is followed."""
    found = []
    for directory, folders, files in os.walk(folder):
        here = Path(directory)
        links = [name for name in folders if (here / name).is_symlink()]
        found += [str((here / name).relative_to(folder)) for name in [*files, *links]]
        if here != folder and not folders and not files:
            found.append(f"{here.relative_to(folder)}/")
    return sorted(found)


def _entry(path: Path, every_digest: bool = False) -> dict[str, Any]:
    size = path.stat().st_size
    if size > _HASHED and not every_digest:
        return {"bytes": size}
    return {"bytes": size, "sha256": file_checksum(path)}


def _is_as_written(path: Path, entry: dict[str, Any]) -> bool:
    if not _is_plain(path) or path.stat().st_size != entry.get("bytes"):
        return False
    return "sha256" not in entry or path.stat().st_size > _HASHED or _entry(path) == entry


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
