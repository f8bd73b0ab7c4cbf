"""Bytes of a data file, unpacked as they are read where its name says that it is packed.

Nothing is unpacked to memory or disk as a whole, and no archive (zip, tar) is opened: `.gz` and `.zst` hold one file.
"""

from __future__ import annotations

import gzip
import io
import zlib
from pathlib import Path
from typing import BinaryIO, cast

import pyarrow as pa

from adalora_scale.data.names import is_packed
from adalora_scale.errors import UserError

MAX_EXPANSION = 1000
"""Bytes out of a byte in. JSON of rows packs to a tenth or a fiftieth, one text repeated without end beyond this."""
_SMALL = 2**28
"""Bytes that any file may unpack to."""


def opened(source: str, path: Path) -> BinaryIO:
    """Open a file for reading its bytes, unpacked.

    Args:
        source: the file's name as the user wrote it.
        path: the file.

    Raises:
        UserError: here or while reading: it is damaged, cut off, or expands beyond `MAX_EXPANSION`.
    """
    if not is_packed(path):
        return path.open("rb")
    return cast(BinaryIO, io.BufferedReader(_Unpacked(source, path), 2**16))


def read_whole(source: str, path: Path, limit: int) -> bytes | None:
    """Return all bytes of a file, unpacked; None if there are more than `limit`.

    Raises:
        UserError: as `opened`.
    """
    if path.stat().st_size > limit:
        return None
    with opened(source, path) as file:
        content = file.read(limit + 1)
    return content if len(content) <= limit else None


class _Unpacked(io.RawIOBase):
    """A packed file's content, with the name of the file in what goes wrong."""

    def __init__(self, source: str, path: Path) -> None:
        self._source = source
        self._limit = max(_SMALL, MAX_EXPANSION * path.stat().st_size)
        self._count = 0
        self._stream: gzip.GzipFile | pa.NativeFile
        if path.suffix.lower() == ".gz":
            self._stream = gzip.GzipFile(path, "rb")
        elif pa.Codec.is_available("zstd"):
            self._stream = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")
        else:
            raise UserError(f"{source}: this build of pyarrow cannot read Zstandard; unpack the file, or use gzip.")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        try:
            count = self._stream.readinto(buffer)
        except (OSError, EOFError, zlib.error) as error:
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self._source} cannot be unpacked: {said}; it is damaged or cut off.") from None
        self._count += count
        if self._count > self._limit:
            raise UserError(
                f"{self._source} holds more than {self._limit:,} bytes, {MAX_EXPANSION:,} times its own size or more, "
                "as no rows of text do; unpack it and look."
            )
        return int(count)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
