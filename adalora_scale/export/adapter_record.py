"""What this project writes beside PEFT's keys into an adapter's weights, with a checksum over it and the tensors.

The record is one entry of the weight file's metadata. Files of others, and ours from before there was a checksum, have
none and are read as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from adalora_scale.errors import UserError
from adalora_scale.export.tensor_files import DTYPE_NAMES, TensorFile, save_file, tensor_bytes
from adalora_scale.finite import require_finite
from adalora_scale.reading.checksums import tensors_checksum
from adalora_scale.reading.json_text import as_object, parse_json
from adalora_scale.reading.schemas import AdapterRecord, checked

RECORD_KEY = "adalora_scale"
"""Entry of the weight file's metadata with what PEFT's config has no key for."""
PEFT_SCALE = "peft_scale"
"""Key of the record: λ was multiplied by `peft_scale(init_r)`, so that PEFT's function is exact."""
CHECKSUM = "checksum"
"""Key of the record: SHA-256 over the tensors and the rest of the record."""
NO_ALLOCATOR, BEFORE_FINAL = "no allocator", "before the final allocation"
UNFINISHED = {
    NO_ALLOCATOR: "no allocator was attached, so nothing was pruned: every matrix has all its triplets",
    BEFORE_FINAL: "it is from before the final allocation and has more triplets than the target budget",
}
"""State in the record of a weight file → what it means. A finished adapter has none."""


def save_adapter_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write an adapter's CPU tensors, as `save_file` does, and their checksum into the record.

    Raises:
        UserError: one has values that are not finite; nothing is written.
    """
    require_finite(tensors, "the adapter")
    record = {key: value for key, value in _record_of(path, metadata).items() if key != CHECKSUM}
    described = ((n, DTYPE_NAMES[t.dtype], tuple(t.shape), [tensor_bytes(t)]) for n, t in tensors.items())
    record[CHECKSUM] = tensors_checksum(described, record)
    save_file(tensors, path, {**(metadata or {}), RECORD_KEY: json.dumps(record, sort_keys=True)})


def checked_record(file: TensorFile) -> dict[str, Any]:
    """Return an adapter file's record after its checksum was compared; empty for files of others.

    Raises:
        UserError: the record cannot be read, or the tensors are not those it was written with.
    """
    record = _record_of(file.path, file.metadata)
    if (written := record.get(CHECKSUM)) is None:
        return record
    rest = {key: value for key, value in record.items() if key != CHECKSUM}
    if tensors_checksum(_described(file), rest) != written:
        raise UserError(f"{file.path} is damaged (its checksum does not fit its tensors); copy it again.")
    return record


def _described(file: TensorFile) -> Iterator[tuple[str, str, tuple[int, ...], Iterator[bytes]]]:
    for name, entry in file.entries.items():
        yield name, entry.dtype, entry.shape, file.chunks(name)


def _record_of(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    name = f"the record of {path}"
    record = as_object(parse_json((metadata or {}).get(RECORD_KEY, "{}"), name), name)
    checked(AdapterRecord, record, name, way_out="copy the file again")
    return record
