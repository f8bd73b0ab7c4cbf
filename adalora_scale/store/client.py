"""A folder on object storage: objects are put, read, listed and removed; every refusal is one line.

fsspec's interface serves all stores. Of S3 the client is pyarrow's, which is installed anyhow: s3fs holds botocore to a
narrow range of versions, which holds others to old ones. Credentials are what the client finds (environment, profile,
the machine's role); none is taken from a URL or written anywhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adalora_scale.errors import UserError
from adalora_scale.store.address import LOCAL, S3, check_address

_CONNECT_S, _REQUEST_S = 5.0, 60.0
_CHUNK = 8 * 2**20
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Where botocore looks for another server than Amazon's; pyarrow does not."""
_NOISE = re.compile(r"^When .*?(?=AWS Error)|\s*\(Request ID: [^)]*\)|^\[Errno \d+\] ")
_PROBE = ".write-probe"


class StoreError(UserError):
    """A store did not do what it was asked to; the message names key, object and the store's reason."""


class Store:
    """A folder of a store.

    Args:
        key: the key or argument that named it, for messages.
        url: the folder; `check_address` says what it may be.

    Raises:
        UserError: the URL is none of a store, or the client cannot be made.
    """

    def __init__(self, key: str, url: str) -> None:
        check_address(key, url)
        self.key, self.url = key, url.rstrip("/")
        with self._saying("", "opened"):
            self._files, self._root = _open(self.url)

    def __str__(self) -> str:
        return f"{self.key}={self.url}"

    def probe(self) -> None:
        """Write a small object and delete it.

        Raises:
            StoreError: the store cannot be reached, or takes no files here.
        """
        name = f"{_PROBE}-{uuid.uuid4().hex[:8]}"
        try:
            self.write(name, b"adalora_scale\n")
            self.remove(name)
        except StoreError as error:
            raise StoreError(f"{error} {_way_out(self.url)}") from None

    def put(self, source: Path, name: str) -> None:
        """Write a file as an object, in place of what is there.

        Raises:
            StoreError: the store did not take all of it.
            OSError: the file cannot be read.
        """
        path, size = self._path(name), source.stat().st_size
        with source.open("rb") as file, self._saying(name, "written"):
            with self._files.open(path, "wb") as out:
                shutil.copyfileobj(file, out, _CHUNK)
            sent = max(size, file.tell())  # a run appends to its records meanwhile
            if (there := self._files.info(path)["size"]) != sent:
                raise OSError(f"{there:,} of {sent:,} bytes arrived")

    def write(self, name: str, content: bytes) -> None:
        """Write an object.

        Raises:
            StoreError: the store did not take it.
        """
        with self._saying(name, "written"):
            self._files.pipe_file(self._path(name), content)

    def read(self, name: str) -> bytes | None:
        """Return an object's content; None where there is none.

        Raises:
            StoreError: it cannot be read.
        """
        with self._saying(name, "read"):
            try:
                return bytes(self._files.cat_file(self._path(name)))
            except FileNotFoundError:
                return None

    def get(self, name: str, target: Path) -> None:
        """Write an object to a file.

        Raises:
            StoreError: it is not there or cannot be read.
            OSError: the disk does not take it.
        """
        with target.open("wb") as out, self._saying(name, "read"), self._files.open(self._path(name), "rb") as file:
            shutil.copyfileobj(file, out, _CHUNK)

    def names(self, folder: str = "") -> dict[str, int | None]:
        """Return what lies in a folder: name → bytes of an object, None of a folder. Empty where there is none.

        Raises:
            StoreError: it cannot be listed.
        """
        path = self._path(folder)
        with self._saying(folder, "listed"):
            self._files.invalidate_cache()  # others write there too
            try:
                entries: list[dict[str, Any]] = self._files.ls(path, detail=True)
            except FileNotFoundError:
                return {}
        found = {}
        for entry in entries:
            name = entry["name"].rstrip("/").rpartition("/")[2]
            if entry["name"].rstrip("/") != path and name:
                found[name] = None if entry["type"] == "directory" else int(entry["size"] or 0)
        return found

    def remove(self, name: str) -> None:
        """Delete an object; one that is not there is no error.

        Raises:
            StoreError: it cannot be deleted.
        """
        with self._saying(name, "deleted"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def remove_folder(self, name: str) -> None:
        """Delete all objects of a folder.

        Raises:
            StoreError: one cannot be deleted.
        """
        with self._saying(name, "deleted"), contextlib.suppress(FileNotFoundError):
            self._files.rm(self._path(name), recursive=True)

    def copy(self, name: str, other: str) -> None:
        """Copy an object.

        Raises:
            StoreError: it is not there, or the store did not take it.
        """
        with self._saying(other, "written"):
            self._files.cp_file(self._path(name), self._path(other))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    @contextlib.contextmanager
    def _saying(self, name: str, done: str) -> Iterator[None]:
        """Turn whatever a store's client raises into one line; each has errors of its own."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            what = f"{self}: {name}" if name else str(self)
            raise StoreError(f"{what} cannot be {done}: {_reason(error)}.") from None


def _open(url: str) -> tuple[Any, str]:
    """Return fsspec's file system for a URL and the folder's path in it."""
    protocol, _, rest = url.partition("://")
    if protocol.lower() in S3:
        from fsspec.implementations.arrow import ArrowFSWrapper
        from pyarrow.fs import S3FileSystem

        endpoint = next((os.environ[name] for name in _ENDPOINTS if os.environ.get(name)), None)
        client = S3FileSystem(endpoint_override=endpoint, connect_timeout=_CONNECT_S, request_timeout=_REQUEST_S)
        return ArrowFSWrapper(client), rest
    from fsspec.core import url_to_fs

    options = {"auto_mkdir": True} if protocol.lower() in LOCAL else {}
    files, path = url_to_fs(url, **options)
    return files, path.rstrip("/")


def _reason(error: Exception) -> str:
    said = str(getattr(error, "strerror", None) or error).strip()
    said = _NOISE.sub("", " ".join(_NOISE.sub("", said).split())).rstrip(" .:")
    return said or type(error).__name__


def _way_out(url: str) -> str:
    if url.partition("://")[0].lower() in S3:
        return (
            "Make the bucket or correct its name, see that AWS_PROFILE (or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)"
            ", AWS_REGION and AWS_ENDPOINT_URL are this store's and may write and delete there, or remove the key."
        )
    return "See that it is there and that this machine's credentials may write and delete in it, or remove the key."
