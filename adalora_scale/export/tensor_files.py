"""safetensors files read and written by ranges, so that memory does not grow with a tensor or a file.

Headers are checked by `reading/headers.py`; the bytes are read here with plain reads, because a memory map counts every
page it touched as resident, and `save_file` wants all tensors of a file at once.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from adalora_scale.adalora.base_digest import sample_positions
from adalora_scale.errors import UserError
from adalora_scale.reading.headers import Entry, read_header

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Dtypes read as tensors; others (fp8, fp4) are only ever copied as bytes."""
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATING = ("F64", "F32", "F16", "BF16")
_CHUNK = 16 * 2**20


class TensorFile:
    """One safetensors file; nothing but what is asked for enters memory.

    Raises:
        UserError: the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        header = read_header(path)
        self.metadata: dict[str, str] = header.metadata
        self.entries: dict[str, Entry] = header.entries

    def tensor(self, name: str) -> Tensor:
        """Read a whole tensor.

        Raises:
            UserError: torch has no such dtype, or the file became shorter.
        """
        entry = self.entries[name]
        return self._elements(entry, entry.begin, entry.end).reshape(entry.shape)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows [start, stop) of a matrix."""
        entry = self.entries[name]
        row = entry.size // max(entry.shape[0], 1)
        whole = self._elements(entry, entry.begin + start * row, entry.begin + stop * row)
        return whole.reshape(-1, *entry.shape[1:])

    def samples(self, name: str) -> Tensor | None:
        """Read the elements that digests look at; None of tensors that are not floating point."""
        entry = self.entries[name]
        return self.elements(name, sample_positions(prod(entry.shape))) if entry.dtype in FLOATING else None

    def elements(self, name: str, positions: Sequence[int]) -> Tensor:
        """Read single elements of a tensor as if it were flat."""
        entry = self.entries[name]
        width = torch.empty(0, dtype=DTYPES[entry.dtype]).element_size()
        starts = [entry.begin + position * width for position in positions]
        parts = [self._elements(entry, start, start + width) for start in starts]
        return torch.cat(parts) if parts else torch.empty(0, dtype=DTYPES[entry.dtype])

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield a tensor's bytes piece by piece."""
        entry = self.entries[name]
        with self.path.open("rb") as file:
            file.seek(entry.begin)
            for start in range(entry.begin, entry.end, _CHUNK):
                yield file.read(min(_CHUNK, entry.end - start))

    def _elements(self, entry: Entry, begin: int, end: int) -> Tensor:
        if entry.dtype not in DTYPES:
            raise UserError(f"{self.path} holds values of {entry.dtype}, which are not read here; save it in another.")
        dtype = DTYPES[entry.dtype]
        buffer = bytearray(end - begin)
        if not buffer:
            return torch.empty(0, dtype=dtype)
        with self.path.open("rb") as file:
            file.seek(begin)
            if file.readinto(buffer) != len(buffer):
                raise UserError(f"{self.path} became shorter while it was read; copy it again.")
        return torch.frombuffer(buffer, dtype=dtype)


class TensorFileWriter:
    """Write one safetensors file tensor by tensor; use it as a context manager.

    Args:
        path: the file.
        tensors: (name, dtype in the format's naming, shape, bytes) of everything that will be written.
        metadata: entries of the header beside ``format``.
    """

    def __init__(
        self,
        path: Path,
        tensors: Iterable[tuple[str, str, Sequence[int], int]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        # Wider dtypes first, as the library does it, so that every tensor starts at a multiple of its element's size.
        ordered = sorted(tensors, key=lambda tensor: -_width(tensor[1], prod(tensor[2]), tensor[3]))
        self.order = [name for name, *_ in ordered]
        """The names in the order in which they must be written."""
        self._sizes = [size for *_, size in ordered]
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        offset = 0
        for name, dtype, shape, size in ordered:
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._file = path.open("wb")
        self._file.write(struct.pack("<Q", len(text)) + text)

    def write(self, pieces: Iterable[bytes | Tensor]) -> int:
        """Write the next tensor of `order` and return its bytes."""
        expected, written = self._sizes.pop(0), 0
        for piece in pieces:
            data = piece if isinstance(piece, bytes) else tensor_bytes(piece)
            written += self._file.write(data)
        if written != expected:
            raise RuntimeError(f"wrote {written} bytes of a tensor of {expected}")
        return written

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if error is None:
                if self._sizes:
                    raise RuntimeError(f"{len(self._sizes)} tensors were not written")
                self._file.flush()
                os.fsync(self._file.fileno())


def save_file(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Write CPU tensors; the same ones give the same bytes, which the library's own does not with two metadata keys."""
    entries = [(n, DTYPE_NAMES[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for n, t in tensors.items()]
    with TensorFileWriter(path, entries, metadata) as writer:
        for name in writer.order:
            writer.write([tensors[name]])


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor without copying a contiguous one."""
    flat: Any = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def _width(dtype: str, numel: int, size: int) -> int:
    """Return the bytes of an element, also of dtypes that torch does not know under the format's name."""
    return DTYPES[dtype].itemsize if dtype in DTYPES else size // max(numel, 1)
