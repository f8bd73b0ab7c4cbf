"""A transformers checkpoint in safetensors files, read slice by slice.

Every read opens its file anew: safetensors maps files into memory, and pages that were touched count as this process's
memory until the map is closed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from adalora_scale.errors import Unsupported, UserError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """Open a file of weights; it may have been damaged since its header was read.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with safe_open(file, framework="pt") as reader:
            yield reader
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is damaged or truncated ({error}); download it again.") from None


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is and what it looks like."""

    file: Path
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name: F32, BF16, U8 …"""


class BaseFiles:
    """The tensors of a checkpoint, without reading them.

    Args:
        files: the safetensors files.
        expected: names that must be in them, file by file, as an index says; None expects nothing.

    Raises:
        UserError: a file is missing, truncated or does not hold what the index says.
    """

    def __init__(self, files: Iterable[Path], expected: dict[Path, set[str]] | None = None) -> None:
        self.tensors: dict[str, StoredTensor] = {}
        self.bytes_read = 0
        """Bytes of all slices read so far by this process."""
        for file in files:
            self._add(file, None if expected is None else expected[file])

    @classmethod
    def open(cls, path: str, revision: str | None = None) -> BaseFiles:
        """Find a local folder's or a hub id's files and read their headers.

        Raises:
            UserError: there is no checkpoint, or it is incomplete.
            Unsupported: there are weights, but not as safetensors.
        """
        folder = Path(path)
        if folder.is_dir():
            index = folder / INDEX_NAME
            if index.is_file():
                return cls._from_index(index, {name: folder / name for name in _index_files(index)})
            if (folder / SINGLE_NAME).is_file():
                return cls([folder / SINGLE_NAME])
            if any(folder.glob("pytorch_model*.bin")):
                raise _pickled(path)
            raise UserError(f"model.model_name_or_path={path} holds neither {SINGLE_NAME} nor {INDEX_NAME}.")
        try:
            found = cached_file(path, INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                names = _index_files(Path(found))
                located = {name: Path(str(cached_file(path, name, revision=revision))) for name in names}
                return cls._from_index(Path(found), located)
            single = cached_file(path, SINGLE_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
            if single is None and any(
                cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
                for name in ("pytorch_model.bin.index.json", "pytorch_model.bin")
            ):
                raise _pickled(path)
            return cls([Path(str(single or cached_file(path, SINGLE_NAME, revision=revision)))])
        except OSError as error:
            raise UserError(f"model.model_name_or_path={path}: {str(error).strip().splitlines()[0]}") from None

    @classmethod
    def _from_index(cls, index: Path, files: dict[str, Path]) -> BaseFiles:
        expected: dict[Path, set[str]] = {path: set() for path in files.values()}
        for tensor, name in _index_map(index).items():
            expected[files[name]].add(tensor)
        for path in expected:
            if not path.is_file():
                raise UserError(f"{index.name} names {path.name}, which is not in {path.parent}; download it again.")
        return cls(expected, expected)

    def _add(self, file: Path, expected: set[str] | None) -> None:
        with _opened(file) as reader:
            for name in reader.keys():  # noqa: SIM118 (not a mapping)
                piece = reader.get_slice(name)
                self.tensors[name] = StoredTensor(file, tuple(piece.get_shape()), piece.get_dtype())
        if expected and (missing := sorted(expected - self.tensors.keys())):
            raise UserError(f"{file} does not hold '{missing[0]}', which the index says it does; download it again.")

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows start to stop of a tensor, on the CPU, into memory of its own."""
        stored = self.tensors[name]
        with _opened(stored.file) as reader:
            if not stored.shape or (start == 0 and stop == stored.shape[0]):
                part: Tensor = reader.get_tensor(name)
            else:
                part = reader.get_slice(name)[start:stop]
            self.bytes_read += part.numel() * part.element_size()
            return part.clone()

    def whole(self, name: str) -> Tensor:
        """Read a whole tensor."""
        shape = self.tensors[name].shape
        return self.rows(name, 0, shape[0] if shape else 0)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Read columns start to stop of a matrix and return them transposed, (stop - start, rows)."""
        with _opened(self.tensors[name].file) as reader:
            part: Tensor = reader.get_slice(name)[:, start:stop]
            self.bytes_read += part.numel() * part.element_size()
            return part.T.clone(memory_format=torch.contiguous_format)

    def weights(self, name: str, start: int, stop: int, *, in_features: int, transposed: bool) -> Tensor:
        """Read the weights start to stop of a row-major (out_features, in_features) matrix, flat.

        Args:
            name: the tensor, stored as (out_features, in_features), or the other way round when `transposed`.
            start, stop: positions in the flattened matrix.
            in_features, transposed: how it is stored.
        """
        if start >= stop:
            return torch.empty(0, dtype=FLOATS[self.tensors[name].dtype])
        first, last = start // in_features, -(-stop // in_features)
        rows = self.columns(name, first, last) if transposed else self.rows(name, first, last)
        return rows.view(-1)[start - first * in_features : stop - first * in_features]


def _pickled(path: str) -> Unsupported:
    return Unsupported(
        f"{path} holds pytorch_model.bin files, which cannot be read in slices; save the model once with "
        f"save_pretrained (safetensors)."
    )


def _index_map(index: Path) -> dict[str, str]:
    try:
        tree = json.loads(index.read_text(encoding="utf-8"))
        return {str(name): str(file) for name, file in tree["weight_map"].items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{index} cannot be read ({error}); download it again.") from None


def _index_files(index: Path) -> list[str]:
    return sorted(set(_index_map(index).values()))
