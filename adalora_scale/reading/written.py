"""A folder that this tool wrote (quantised base, merged model) beside what its export.json says of every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adalora_scale.errors import UserError
from adalora_scale.reading.checksums import file_checksum
from adalora_scale.reading.folders import named_file, own_file
from adalora_scale.reading.json_text import file_size, read_object, shown

RECORD_NAME = "export.json"
TOOL = "adalora-scale"


def check_written(name: str, rank: int = 0, world_size: int = 1) -> None:
    """Compare a model folder's files with sizes and digests that its record has of them; no record, no check.

    Every size is compared; a digest, where the record has one, by one rank a file: each byte is read once over all
    ranks, piece by piece, at some 1 to 2 GB a second.

    Args:
        name: the folder; a hub id has no record.
        rank, world_size: whose share is read.

    Raises:
        UserError: a file is missing or not as it was written.
    """
    folder = Path(name)
    record = folder / RECORD_NAME
    if not record.exists():
        return
    content = read_object(own_file(record, folder))
    written = content.get("written")
    if content.get("tool") != TOOL or not isinstance(written, dict):
        return
    for number, (file, entry) in enumerate(sorted(written.items())):
        if file.endswith("/"):
            continue
        path = named_file(file, folder, source=record)
        if not path.exists():
            raise UserError(f"{path} is missing, {RECORD_NAME} lists it; copy the folder again.")
        if reason := _why_other(path, entry, hashed=number % world_size == rank):
            raise UserError(
                f"{path} is not as it was written ({reason}); copy it again, or remove {record} if you changed it."
            )


def _why_other(path: Path, entry: Any, *, hashed: bool) -> str:
    if not isinstance(entry, dict) or file_size(path) != entry.get("bytes"):
        said = entry.get("bytes") if isinstance(entry, dict) else entry
        return f"{file_size(path):,} bytes, {RECORD_NAME} says {shown(said)}"
    if not hashed or "sha256" not in entry:
        return ""
    try:
        return "" if file_checksum(path) == entry["sha256"] else "its checksum does not fit"
    except OSError as error:
        return str(error.strerror)
