"""The header of a safetensors file: read within limits and checked in full before anything uses an offset of it.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from adalora_scale.errors import UserError
from adalora_scale.reading.json_text import MAX_BYTES, as_object, file_size, parse_json, shown

BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
"""Bits of an element, by the format's name of its dtype."""
_MAX_DIMENSIONS = 16
_MAX_NAME = 1000
"""Letters of a tensor's name."""


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in its file."""

    dtype: str
    """The format's own name, such as BF16."""
    shape: tuple[int, ...]
    begin: int
    """First byte, counted from the start of the file."""
    end: int

    @property
    def size(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself."""

    entries: dict[str, Entry]
    """In the order of the header."""
    metadata: dict[str, str]


def read_header(path: Path, *, error: type[UserError] = UserError) -> Header:
    """Read and check a header: sizes fit shapes and dtypes, and tensors fill the file without gap or overlap.

    Raises:
        UserError: (as `error`) the file is missing, cut off, damaged, or its header is larger than `MAX_BYTES`.
    """
    size = file_size(path, error=error)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 0 <= length <= size - 8:
                _damaged(path, "it is too short for its header", error)
            if length > MAX_BYTES:
                raise error(f"{path} has a header of {length:,} bytes; at most {MAX_BYTES:,} are read.")
            text = file.read(length)
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror}.") from None
    tree = as_object(parse_json(text, f"the header of {path}", error=error), f"the header of {path}", error=error)
    metadata = tree.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _damaged(path, "its metadata is not text by name", error)
    entries = {name: _entry(path, name, entry, 8 + length, error) for name, entry in tree.items()}
    end = 8 + length
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
        if entry.begin != end:
            _damaged(path, f"{shown(name)} begins at byte {entry.begin}, not {end}", error)
        end = entry.end
    if end != size:
        _damaged(path, f"it has {size:,} bytes, its header says {end:,}", error)
    return Header(entries, metadata)


def _entry(path: Path, name: str, entry: Any, offset: int, error: type[UserError]) -> Entry:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _damaged(path, f"{shown(name)} lacks a dtype, a shape or offsets", error)
    if len(name) > _MAX_NAME:
        _damaged(path, f"a name in it is longer than {_MAX_NAME} letters", error)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        _damaged(path, f"{shown(name)} has the dtype {shown(dtype)}", error)
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        _damaged(path, f"{shown(name)} has no usable shape", error)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _damaged(path, f"{shown(name)} has no usable offsets", error)
    if prod(shape) * BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        _damaged(path, f"{shown(name)} has another size than its shape and dtype", error)
    return Entry(dtype, tuple(shape), offset + offsets[0], offset + offsets[1])


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


def _damaged(path: Path, what: str, error: type[UserError]) -> NoReturn:
    raise error(f"{path} is damaged or truncated ({what}); copy it again.")
