"""The files of a checkpoint, and nothing else: no process group, no model, no trainer.

    checkpoint-12/
        pieces-00000-of-00002.safetensors   what rank 0 wrote
        pieces-00001-of-00002.safetensors   what rank 1 wrote
        trainer_state.json                  transformers' own
        manifest.json                       sizes and checksums of the others, shapes, position; written last

A file of pieces holds, for every *group* of tensors (`adapter`, `other`), one flat tensor a *kind* (`weight`,
`exp_avg`, `sensitivity`, …) and one table of intervals: rows (index of the tensor, start, length), in the order in
which their elements stand in the flat tensors. An interval is a contiguous piece of a tensor in row-major order.
Whoever reads asks for an interval of its own and gets it from whichever files hold it.

Nothing here is ever unpickled: safetensors and JSON only.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adalora_scale.errors import UserError
from adalora_scale.files import sync

MANIFEST_NAME = "manifest.json"
VERSION = 1
"""Raised when a reader of the version before would misread the files."""

_FORMAT = "adalora_scale checkpoint"
_TABLE = "intervals"
_NO_CHECKSUM = "0" * 64
_CHECKSUM = re.compile(rb'"checksum": "([0-9a-f]{64})"')
_FOLDER = re.compile(r"checkpoint-(\d+)")


class CheckpointError(UserError):
    """A checkpoint cannot be used: the message names the file and what is wrong with it."""


@dataclass
class Group:
    """This rank's intervals of a group of tensors, with one value a kind for each interval."""

    intervals: list[tuple[str, int, int]] = field(default_factory=list)
    """(name of the tensor, start, length)."""
    values: dict[str, list[Tensor]] = field(default_factory=dict)
    """kind → (length,) tensors, one an interval."""


# ---- writing ----------------------------------------------------------------------------------------------------


def pieces_name(rank: int, world_size: int) -> str:
    """Return the name of the file that `rank` writes."""
    return f"pieces-{rank:05d}-of-{world_size:05d}.safetensors"


def write_pieces(
    path: Path, groups: Mapping[str, Group], names: Mapping[str, Sequence[str]], extras: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Write one rank's file and return its entry in the manifest, once the bytes are on disk.

    Args:
        path: the file.
        groups: group → this rank's intervals and values.
        names: group → the names of its tensors, the same list on every rank.
        extras: further small tensors of this rank, such as the states of its random number generators.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    tensors: dict[str, Tensor] = {f"extra.{key}": value.contiguous() for key, value in extras.items()}
    for name, group in groups.items():
        index = {tensor: number for number, tensor in enumerate(names[name])}
        rows = [(index[tensor], start, length) for tensor, start, length in group.intervals]
        tensors[f"{name}.{_TABLE}"] = torch.tensor(rows, dtype=torch.int64).view(-1, 3)
        for kind, values in group.values.items():
            flat = [value.detach().reshape(-1).cpu() for value in values]
            tensors[f"{name}.{kind}"] = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.float32)
    try:
        save_file(tensors, path)
    except SafetensorError as error:  # what Rust's writer makes of a full disk
        raise OSError(str(error)) from None
    sync(path)
    return file_entry(path)


def write_manifest(directory: Path, content: Mapping[str, Any]) -> None:
    """Write manifest.json with the format's name, its version and a checksum over itself.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    tree = {"format": _FORMAT, "version": VERSION, "checksum": _NO_CHECKSUM, **content}
    blank = (json.dumps(tree, indent=1) + "\n").encode()
    digest = hashlib.sha256(blank).hexdigest()
    path = directory / MANIFEST_NAME
    path.write_bytes(blank.replace(_NO_CHECKSUM.encode(), digest.encode(), 1))
    sync(path)


def file_entry(path: Path) -> dict[str, Any]:
    """Return a file's size and checksum, as the manifest lists them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def publish(partial: Path, final: Path) -> None:
    """Give a complete folder its name: `final` appears whole or not at all.

    Raises:
        OSError: the folder cannot be renamed.
    """
    sync(partial)
    os.rename(partial, final)
    sync(final.parent)


def remove(directory: Path) -> None:
    """Delete a checkpoint; killed in the middle, what is left is no longer taken for one."""
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


# ---- reading ----------------------------------------------------------------------------------------------------


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders of `output_dir` that end in a manifest, the newest (highest step) first."""
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        match = _FOLDER.fullmatch(path.name)
        if match and (path / MANIFEST_NAME).is_file():
            found.append((int(match.group(1)), path))
    return [path for _, path in sorted(found, reverse=True)]


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read manifest.json after its checksum was compared.

    Raises:
        CheckpointError: it is missing, damaged, of something else, or of a newer version.
    """
    path = Path(directory) / MANIFEST_NAME
    try:
        content = path.read_bytes()
    except OSError as error:
        reason = "is not complete (it has no manifest.json)" if isinstance(error, FileNotFoundError) else error.strerror
        raise CheckpointError(f"the checkpoint {directory} {reason}; name another one.") from None
    match = _CHECKSUM.search(content)
    blank = content.replace(match.group(1), _NO_CHECKSUM.encode(), 1) if match else content
    if match is None or hashlib.sha256(blank).hexdigest().encode() != match.group(1):
        raise CheckpointError(f"{path} is damaged (its checksum does not fit); resume from another checkpoint.")
    tree = json.loads(content)
    if tree.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of adalora_scale.")
    if tree["version"] > VERSION:
        raise CheckpointError(
            f"{path} has version {tree['version']}, this adalora_scale reads up to {VERSION}; install a newer one."
        )
    return dict(tree)


@dataclass(frozen=True)
class _Opened:
    handle: Any
    keys: frozenset[str]


class Checkpoint:
    """A checkpoint opened for reading; any rank reads any interval.

    Args:
        directory: the folder.

    Raises:
        CheckpointError: the manifest cannot be used, see `read_manifest`.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(directory)
        self._files: dict[str, _Opened] = {}
        self._places: dict[str, dict[str, list[tuple[int, int, str, int]]]] = {}

    @property
    def files(self) -> list[str]:
        """The files that the manifest lists, in its order."""
        return list(self.manifest["files"])

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return int(self.manifest["world_size"])

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        """Return name → shape of every tensor of a group."""
        return {name: tuple(shape) for name, shape in self.manifest["tensors"].get(group, {}).items()}

    def kinds(self, group: str) -> set[str]:
        """Return the kinds that some rank wrote for a group."""
        prefix = f"{group}."
        keys = frozenset[str]().union(*(self._open(name).keys for name in self._piece_files()))
        return {key.removeprefix(prefix) for key in keys if key.startswith(prefix)} - {_TABLE}

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Compare sizes and checksums of `files` (all of them by default) with the manifest.

        Raises:
            CheckpointError: one is missing or damaged; the message names it.
        """
        for name in self.files if files is None else files:
            entry, path = self.manifest["files"][name], self.directory / name
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; copy it back or resume from another checkpoint.")
            if path.stat().st_size != entry["bytes"]:
                raise CheckpointError(
                    f"{path} is damaged ({path.stat().st_size} of {entry['bytes']} bytes); resume from another "
                    f"checkpoint."
                )
            try:
                same = file_entry(path) == entry
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
            if not same:
                raise CheckpointError(f"{path} is damaged (its checksum does not fit); resume from another checkpoint.")

    def read(self, group: str, kind: str, name: str, start: int, length: int) -> Tensor | None:
        """Return elements [start, start + length) of a tensor, (length,), or None where none of them was written.

        Raises:
            CheckpointError: only a part of them was written.
        """
        result: Tensor | None = None
        covered = 0
        for begin, size, file, offset in self._intervals(group).get(name, ()):
            low, high = max(start, begin), min(start + length, begin + size)
            opened = self._open(file)
            if low >= high or f"{group}.{kind}" not in opened.keys:
                continue
            piece = opened.handle.get_slice(f"{group}.{kind}")[offset + low - begin : offset + high - begin]
            if result is None:
                result = torch.empty(length, dtype=piece.dtype)
            result[low - start : high - start] = piece
            covered += high - low
        if covered != length and (covered or kind == "weight"):
            raise CheckpointError(
                f"the checkpoint {self.directory} holds {covered} of {length} elements of '{name}' ({kind}); its files "
                f"do not belong together."
            )
        return result if covered else (torch.empty(0, dtype=torch.float32) if length == 0 else None)

    def read_whole(self, group: str, kind: str, name: str) -> Tensor | None:
        """Return a whole tensor in its shape, or None where this kind was not written for it."""
        shape = self.shapes(group)[name]
        flat = self.read(group, kind, name, 0, torch.Size(shape).numel())
        return None if flat is None else flat.view(shape)

    def extra(self, rank: int, key: str) -> Tensor | None:
        """Return a further tensor that `rank` wrote, or None."""
        opened = self._open(pieces_name(rank, self.world_size))
        return opened.handle.get_tensor(f"extra.{key}") if f"extra.{key}" in opened.keys else None

    def _piece_files(self) -> list[str]:
        return [pieces_name(rank, self.world_size) for rank in range(self.world_size)]

    def _open(self, name: str) -> _Opened:
        if name not in self._files:
            path = self.directory / name
            try:
                handle = safe_open(path, framework="pt")
                self._files[name] = _Opened(handle, frozenset(handle.keys()))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read ({error}); resume from another checkpoint.") from None
        return self._files[name]

    def _intervals(self, group: str) -> dict[str, list[tuple[int, int, str, int]]]:
        """name → (start, length, file, offset in the file's flat tensors), read once from all files."""
        if group not in self._places:
            names = list(self.manifest["tensors"][group])
            places: dict[str, list[tuple[int, int, str, int]]] = {}
            for file in self._piece_files():
                offset = 0
                for index, start, length in self._open(file).handle.get_tensor(f"{group}.{_TABLE}").tolist():
                    places.setdefault(names[index], []).append((start, length, file, offset))
                    offset += length
            self._places[group] = places
        return self._places[group]
