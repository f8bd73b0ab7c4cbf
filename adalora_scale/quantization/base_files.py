"""A transformers checkpoint in safetensors files, read slice by slice.

Every read opens its file anew: safetensors maps files into memory, and pages that were touched count as this process's
memory until the map is closed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils.hub import cached_file

from adalora_scale.errors import Unsupported, UserError
from adalora_scale.reading.folders import named_file, own_file
from adalora_scale.reading.headers import read_header
from adalora_scale.reading.json_text import read_object
from adalora_scale.reading.schemas import Index, checked

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
Parts = tuple[tuple[str, ...], ...]
"""Of each expert, the tensors whose rows are its rows, in their order."""
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
        self.fused: dict[str, Parts] = {}
        """Tensors over experts that the files hold part by part (`fuse`)."""
        self.bytes_read = 0
        """Bytes of all slices read so far by this process."""
        for file in files:
            self._add(file, None if expected is None else expected[file])

    @classmethod
    def open(cls, path: str, revision: str | None = None) -> BaseFiles:
        """Find a local folder's or a hub id's files and read their headers.

        Raises:
            UserError: there is no checkpoint, or it is incomplete.
            Unsupported: there are weights, but only as pickles, which are not opened.
        """
        folder = Path(path)
        if folder.is_dir():
            index = folder / INDEX_NAME
            if index.exists():
                tree = _index_map(own_file(index, folder))
                located = {name: named_file(name, folder, source=index) for name in sorted(set(tree.values()))}
                return cls._from_index(index, tree, located)
            if (folder / SINGLE_NAME).exists():
                return cls([own_file(folder / SINGLE_NAME, folder)])
            if any(folder.glob("pytorch_model*.bin")):
                raise _pickled(path)
            raise UserError(f"model.model_name_or_path={path} holds neither {SINGLE_NAME} nor {INDEX_NAME}.")
        try:
            found = cached_file(path, INDEX_NAME, revision=revision, _raise_exceptions_for_missing_entries=False)
            if found is not None:
                index, tree = Path(found), _index_map(Path(found))
                names = sorted(set(tree.values()))
                for name in names:
                    named_file(name, index.parent, source=index)
                located = {name: Path(str(cached_file(path, name, revision=revision))) for name in names}
                return cls._from_index(index, tree, located)
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
    def _from_index(cls, index: Path, tree: dict[str, str], files: dict[str, Path]) -> BaseFiles:
        expected: dict[Path, set[str]] = {path: set() for path in files.values()}
        for tensor, name in tree.items():
            expected[files[name]].add(tensor)
        for path in expected:
            if not path.is_file():
                raise UserError(f"{index.name} names {path.name}, which is not in {path.parent}; download it again.")
        return cls(expected, expected)

    def _add(self, file: Path, expected: set[str] | None) -> None:
        found: dict[str, StoredTensor] = {}
        for name, entry in read_header(file).entries.items():
            found[name] = StoredTensor(file, entry.shape, entry.dtype)
        if expected and (missing := sorted(expected - found.keys())):
            raise UserError(f"{file} does not hold '{missing[0]}', which the index says it does; download it again.")
        if twice := sorted(found.keys() & self.tensors.keys()):
            first = self.tensors[twice[0]].file
            raise UserError(f"'{twice[0]}' is in {first} and in {file.name}; download the model again.")
        self.tensors |= found

    def fuse(self, fused: Mapping[str, Parts]) -> None:
        """Make tensors over experts readable under names of their own: (experts, rows of all parts, columns).

        Raises:
            UserError: experts differ in shape or dtype.
        """
        for experts in fused.values():
            first = [self.tensors[part] for part in experts[0]]
            for parts in experts:
                for part, like in zip(parts, first, strict=True):
                    found = self.tensors[part]
                    if len(found.shape) != 2 or found.dtype != first[0].dtype or found.shape != like.shape:
                        raise UserError(
                            f"'{part}' is {found.dtype} {found.shape} in {found.file.name}, '{experts[0][0]}' "
                            f"{first[0].dtype} {first[0].shape}; experts have one shape. Download the model again."
                        )
        self.fused |= fused

    def stored(self, name: str) -> StoredTensor:
        """Return what a tensor looks like; of a fused one, `file` is its first part's."""
        if name not in self.fused:
            return self.tensors[name]
        experts = self.fused[name]
        first = [self.tensors[part] for part in experts[0]]
        shape = (len(experts), sum(part.shape[0] for part in first), first[0].shape[1])
        return StoredTensor(first[0].file, shape, first[0].dtype)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows start to stop of a tensor, on the CPU, into memory of its own."""
        if name in self.fused:
            experts = self.fused[name][start:stop]
            whole = [torch.cat([self.whole(part) for part in parts]) for parts in experts]
            return torch.stack(whole) if whole else torch.empty(0, dtype=FLOATS[self.stored(name).dtype])
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
        shape = self.stored(name).shape
        return self.rows(name, 0, shape[0] if shape else 0)

    def columns(self, name: str, start: int, stop: int) -> Tensor:
        """Read columns start to stop of a matrix and return them transposed, (stop - start, rows)."""
        with _opened(self.tensors[name].file) as reader:
            part: Tensor = reader.get_slice(name)[:, start:stop]
            self.bytes_read += part.numel() * part.element_size()
            return part.T.clone(memory_format=torch.contiguous_format)

    def expert_rows(self, name: str, expert: int, start: int, stop: int) -> Tensor:
        """Read rows start to stop of one expert's matrix, as the files hold it, of a tensor over experts."""
        if name not in self.fused:
            return self._of_expert(name, expert, slice(start, stop), slice(None))
        pieces, before = [], 0
        for part in self.fused[name][expert]:
            own = self.tensors[part].shape[0]
            first, last = max(start - before, 0), min(stop - before, own)
            if first < last:
                pieces.append(self.rows(part, first, last))
            before += own
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def expert_weights(
        self, name: str, expert: int, start: int, stop: int, *, in_features: int, transposed: bool
    ) -> Tensor:
        """Do what `weights` does, of one expert's matrix in a tensor over experts."""
        if start >= stop:
            return torch.empty(0, dtype=FLOATS[self.stored(name).dtype])
        first, last = start // in_features, -(-stop // in_features)
        if not transposed:
            rows = self.expert_rows(name, expert, first, last)
        elif name in self.fused:  # nobody's so far
            rows = self.expert_rows(name, expert, 0, in_features)[:, first:last].T
        else:
            rows = self._of_expert(name, expert, slice(None), slice(first, last)).T
        return rows.reshape(-1)[start - first * in_features : stop - first * in_features]

    def _of_expert(self, name: str, expert: int, rows: slice, columns: slice) -> Tensor:
        with _opened(self.tensors[name].file) as reader:
            part: Tensor = reader.get_slice(name)[expert : expert + 1, rows, columns]
            self.bytes_read += part.numel() * part.element_size()
            return part[0].clone()

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
        f"{path} holds pickled weights (pytorch_model.bin), which can run code when they are opened; only safetensors "
        f"are read. Save the model with transformers' save_pretrained where you trust it."
    )


def _index_map(index: Path) -> dict[str, str]:
    """Return tensor → file."""
    tree = read_object(index)
    checked(Index, tree, index, way_out="download it again")
    return dict(tree["weight_map"])
