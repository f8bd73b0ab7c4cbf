"""A checksum over tensors: their names, dtypes, shapes and bytes, and whatever else stands beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

_PIECE_BYTES = 2**24
"""Large: between two pieces a thread that hashes beside training waits for Python's lock, and lets training wait."""


def tensors_checksum(
    tensors: Iterable[tuple[str, str, tuple[int, ...], Iterable[bytes | memoryview]]], record: Mapping[str, Any]
) -> str:
    """Return the SHA-256 of tensors and a record, whatever their order in the file.

    Args:
        tensors: (name, dtype in safetensors' naming, shape, the bytes piece by piece).
        record: JSON values that are covered too.
    """
    digest = hashlib.sha256(json.dumps(dict(record), sort_keys=True).encode())
    for name, dtype, shape, pieces in sorted(tensors, key=lambda tensor: tensor[0]):
        digest.update(json.dumps([name, dtype, list(shape)]).encode())
        for piece in pieces:
            digest.update(piece)
    return digest.hexdigest()


def file_checksum(path: Path) -> str:
    """Return a file's SHA-256, read piece by piece.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        buffer = memoryview(bytearray(min(_PIECE_BYTES, max(path.stat().st_size, 1))))
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()
