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
import math
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from adalora_scale.adalora.adaptables import FACTORS
from adalora_scale.checkpoint.errors import CheckpointError
from adalora_scale.checkpoint.flat import TABLE
from adalora_scale.checkpoint.layout import ranks_with
from adalora_scale.checkpoint.tables import Own, Places, own_places, places
from adalora_scale.errors import UserError
from adalora_scale.files import sync
from adalora_scale.reading.checksums import file_checksum
from adalora_scale.reading.folders import own_file
from adalora_scale.reading.headers import Entry, read_header
from adalora_scale.reading.json_text import file_size, parse_json, read_bytes, read_object, shown
from adalora_scale.reading.schemas import Manifest, TrainerState, checked

MANIFEST_NAME = "manifest.json"
VERSION = 1
"""Raised when a reader of the version before would misread the files."""

_FORMAT = "adalora_scale checkpoint"
_TRAINER_STATE = "trainer_state.json"
MAX_TRAINER_STATE = 256 * 2**20
"""It grows with every line that was logged."""
_NO_CHECKSUM = "0" * 64
_CHECKSUM = re.compile(rb'"checksum": "([0-9a-f]{64})"')
_PLAIN = re.compile(r"\w[\w.\-]*", re.ASCII)
_FOLDER = re.compile(r"checkpoint-(\d+)")


# ---- writing ----------------------------------------------------------------------------------------------------


def pieces_name(rank: int, world_size: int) -> str:
    """Return the name of the file that `rank` writes."""
    return f"pieces-{rank:05d}-of-{world_size:05d}.safetensors"


def kinds_in(keys: Iterable[str], group: str) -> set[str]:
    """Return the kinds of a group among the names in a file."""
    return {key[len(group) + 1 :] for key in keys if key.startswith(f"{group}.")} - {TABLE}


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write a safetensors file and return its entry in the manifest, once the bytes are on disk.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    try:
        save_file(dict(tensors), path)
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


def require_readable(directory: Path, content: Mapping[str, Any]) -> None:
    """See that a manifest will be read back: a state that no reader knows is told at the first one.

    Raises:
        RuntimeError: it will not.
    """
    tree = json.loads(json.dumps({"format": _FORMAT, "version": VERSION, **content}))
    try:
        checked(Manifest, tree, directory / MANIFEST_NAME, way_out="report it")
    except UserError as problem:
        raise RuntimeError(f"a checkpoint would be written that nobody can read: {problem}") from None


def file_entry(path: Path) -> dict[str, Any]:
    """Return a file's size and checksum, as the manifest lists them."""
    return {"bytes": path.stat().st_size, "sha256": file_checksum(path)}


def publish(partial: Path, final: Path) -> None:
    """Give a complete folder its name: `final` appears whole or not at all.

    Raises:
        OSError: the folder cannot be renamed.
    """
    sync(partial)
    os.rename(partial, final)
    sync(final.parent)


def remove(directory: Path) -> None:
    """Delete a checkpoint; killed in the middle, what is left is no longer taken for one. Of a link the link goes."""
    if directory.is_symlink():
        directory.unlink(missing_ok=True)
        return
    (directory / MANIFEST_NAME).unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)


# ---- reading ----------------------------------------------------------------------------------------------------


def checkpoints(output_dir: str | Path) -> list[Path]:
    """Return the folders of `output_dir` that end in a manifest, the newest (highest step) first.

    What counts is the step that the manifest tells: folders are copied and renamed.
    """
    found = [path for path in numbered(output_dir) if (path / MANIFEST_NAME).is_file()]
    steps = {path: step_of(path) for path in found}
    return sorted(found, key=lambda path: (steps[path], path.name == f"checkpoint-{steps[path]}"), reverse=True)


def numbered(output_dir: str | Path) -> list[Path]:
    """Return everything in `output_dir` that is named as a checkpoint, whatever it is."""
    return sorted(path for path in Path(output_dir).glob("checkpoint-*") if _FOLDER.fullmatch(path.name))


def step_of(directory: Path) -> int:
    """Return a checkpoint's step; where its manifest cannot be used, the one that its name tells."""
    try:
        return int(read_manifest(directory)["step"])
    except CheckpointError:
        return int(directory.name.rpartition("-")[2])


def read_manifest(directory: str | Path) -> dict[str, Any]:
    """Read manifest.json after its checksum was compared, and check all of it that is used here.

    Whoever writes a file can write its checksum too, so that proves nothing about what the file says.

    Raises:
        CheckpointError: it is missing, damaged, of something else, or of a newer version.
    """
    path = Path(directory) / MANIFEST_NAME
    if not path.exists():
        raise CheckpointError(
            f"the checkpoint {directory} is not complete (it has no manifest.json); name another one."
        )
    content = read_bytes(own_file(path, path.parent, error=CheckpointError), error=CheckpointError)
    match = _CHECKSUM.search(content)
    blank = content.replace(match.group(1), _NO_CHECKSUM.encode(), 1) if match else content
    if match is None or hashlib.sha256(blank).hexdigest().encode() != match.group(1):
        raise CheckpointError(f"{path} is damaged (its checksum does not fit); resume from another checkpoint.")
    tree = parse_json(content, path, finite=False, error=CheckpointError)
    if not isinstance(tree, dict) or tree.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of adalora_scale.")
    if type(version := tree.get("version")) is int and version > VERSION:
        raise CheckpointError(
            f"{path} has version {version}, this adalora_scale reads up to {VERSION}; install a newer one."
        )
    checked(Manifest, tree, path, error=CheckpointError, way_out="resume from another checkpoint")
    _require_factors(tree, path)
    expected = {pieces_name(rank, tree["world_size"]) for rank in range(tree["world_size"])}
    pieces = {name for name in tree["files"] if name.startswith("pieces-")}
    if pieces != expected or any(not _PLAIN.fullmatch(name) for name in tree["files"]):
        raise CheckpointError(f"{path} does not list the files of {tree['world_size']} ranks; take another checkpoint.")
    return tree


def _require_factors(tree: dict[str, Any], path: Path) -> None:
    """See that every module of the mask has its factors among the tensors; one without a triplet may have none."""
    shapes = tree["tensors"].get("adapter", {})
    for module, bits in (tree.get("allocator") or {}).get("mask", {}).items():
        a, e, b = (tuple(shapes.get(f"{module}.{factor}", ())) for factor in FACTORS)
        found = [len(a), len(e), len(b)]
        # Of several matrices E has a row each; A, B and the mask are divided evenly among them.
        fits = found == [2, 1, 2] or (
            found == [2, 2, 2] and e[0] > 0 and all(whole % e[0] == 0 for whole in (a[0], b[0], len(bits)))
        )
        if not fits and ("1" in bits or any(found)):
            raise CheckpointError(f"{path} has no A, E and B of {shown(module)}; resume from another checkpoint.")


@dataclass(frozen=True)
class _Opened:
    handle: Any
    keys: dict[str, Entry]


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
        self._places: dict[str, Places] = {}
        self._own: dict[tuple[str, str], Own] = {}

    @property
    def files(self) -> list[str]:
        """The files that the manifest lists, in its order."""
        return list(self.manifest["files"])

    @property
    def opened(self) -> list[str]:
        """The files of pieces that were opened so far."""
        return list(self._files)

    @property
    def world_size(self) -> int:
        """How many ranks wrote it."""
        return int(self.manifest["world_size"])

    @property
    def holders(self) -> list[int]:
        """The ranks whose files hold elements of tensors; where the manifest does not say, all of them."""
        found: set[int] = set()
        for group, tensors in self.manifest["tensors"].items():
            runs = (self.manifest.get("runs") or {}).get(group) or {}
            for name, shape in tensors.items():
                if name not in runs:
                    return list(range(self.world_size))
                found.update(ranks_with(tuple(runs[name]), 0, math.prod(shape), self.world_size))
        return sorted(found)

    def shapes(self, group: str) -> dict[str, tuple[int, ...]]:
        """Return name → shape of every tensor of a group."""
        return {name: tuple(shape) for name, shape in self.manifest["tensors"].get(group, {}).items()}

    def kinds(self, group: str) -> set[str]:
        """Return the kinds that some rank wrote for a group; where the manifest does not say, all files are asked."""
        told = self.manifest.get("kinds") or {}
        return set(told.get(group, ())).union(*(kinds_in(self._open(f).keys, group) for f in self._piece_files(told)))

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Compare sizes and checksums of `files` (all of them by default) with the manifest.

        Raises:
            CheckpointError: one is missing or damaged, or leads out of the folder; the message names it.
        """
        for name in self.files if files is None else files:
            entry, path = self.manifest["files"][name], self.directory / name
            if not path.exists():
                raise CheckpointError(f"{path} is missing; copy it back or resume from another checkpoint.")
            size = file_size(own_file(path, self.directory, error=CheckpointError), error=CheckpointError)
            if size != entry["bytes"]:
                raise CheckpointError(
                    f"{path} is damaged ({size} of {entry['bytes']} bytes); resume from another checkpoint."
                )
            try:
                same = file_entry(path) == entry
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from None
            if not same:
                raise CheckpointError(f"{path} is damaged (its checksum does not fit); resume from another checkpoint.")
            if name == _TRAINER_STATE:  # transformers reads it without a check
                state = read_object(path, limit=MAX_TRAINER_STATE, finite=False, error=CheckpointError)
                checked(TrainerState, state, path, error=CheckpointError, way_out="resume from another checkpoint")

    def read(self, group: str, kind: str, name: str, start: int, length: int) -> Tensor | None:
        """Return elements [start, start + length) of a tensor, (length,), or None where none of them was written.

        Raises:
            CheckpointError: only a part of them was written, or the files' tables are wrong.
        """
        result: Tensor | None = None
        covered = 0
        for begin, size, file, offset in self._intervals(group, name, start, length):
            low, high = max(start, begin), min(start + length, begin + size)
            if low >= high or f"{group}.{kind}" not in (opened := self._open(file)).keys:
                continue
            if low < start + covered:  # a gap would hide behind it
                twice = f"the checkpoint {self.directory} holds element {low} of '{name}' twice ({file}); its files do"
                raise CheckpointError(f"{twice} not belong together.")
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

    def _piece_files(self, told: Mapping[str, Any] | None = None) -> list[str]:
        return [] if told else [pieces_name(rank, self.world_size) for rank in range(self.world_size)]

    def _open(self, name: str) -> _Opened:
        if name not in self._files:
            path = own_file(self.directory / name, self.directory, error=CheckpointError)
            header = read_header(path, error=CheckpointError)
            try:
                self._files[name] = _Opened(safe_open(path, framework="pt"), header.entries)
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read ({error}); resume from another checkpoint.") from None
        return self._files[name]

    def _intervals(self, group: str, name: str, start: int, length: int) -> list[tuple[int, int, str, int]]:
        """(start, length, file, offset in its flat tensors), by start; without a run all tables are read, once."""
        run = ((self.manifest.get("runs") or {}).get(group) or {}).get(name)
        if run is None:
            if group not in self._places:
                tables = {file: self._table(group, file) for file in self._piece_files()}
                flat = {file: self._elements(group, file) for file in tables}
                self._places[group] = places(self.directory, self.shapes(group), tables, flat)
            return self._places[group].get(name, [])
        found = []
        for rank in ranks_with(tuple(run), start, length, self.world_size):
            file = pieces_name(rank, self.world_size)
            if (group, file) not in self._own:
                elements, shapes = self._elements(group, file), self.shapes(group)
                self._own[group, file] = own_places(self.directory / file, shapes, self._table(group, file), elements)
            found += [(begin, size, file, offset) for begin, size, offset in self._own[group, file].get(name, [])]
        return sorted(found)

    def _table(self, group: str, file: str) -> Tensor:
        opened, key = self._open(file), f"{group}.{TABLE}"
        table = opened.keys.get(key)
        if table is None or table.dtype != "I64" or len(table.shape) != 2 or table.shape[1] != 3:
            raise CheckpointError(f"{self.directory / file} has no table '{key}'; take another checkpoint.")
        return opened.handle.get_tensor(key)

    def _elements(self, group: str, file: str) -> dict[str, int]:
        keys = self._open(file).keys
        return {f"{group}.{kind}": math.prod(keys[f"{group}.{kind}"].shape) for kind in kinds_in(keys, group)}
