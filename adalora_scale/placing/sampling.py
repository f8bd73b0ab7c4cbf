"""What digests and fingerprints look at of a base's weights, read from its files, tensors over experts included."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from adalora_scale.adalora.base_digest import sample_positions
from adalora_scale.adalora.fingerprint import LEADING
from adalora_scale.export.tensor_files import FLOATING, TensorFile
from adalora_scale.quantization.base_files import BaseFiles


class Samples:
    """Single elements of a checkpoint's tensors; headers are read once a file."""

    def __init__(self, checkpoint: BaseFiles) -> None:
        self._checkpoint = checkpoint
        self._files: dict[Path, TensorFile] = {}

    def of(self, source: str) -> Tensor | None:
        """Return the elements that digests look at, as of the whole tensor; None of one that is not floating point."""
        stored = self._checkpoint.stored(source)
        if stored.dtype not in FLOATING:
            return None
        positions = sample_positions(math.prod(stored.shape))
        if source not in self._checkpoint.fused:
            return self._file(stored.file).elements(source, positions)
        _, rows, columns = stored.shape
        found = []
        for position in positions:
            expert, inside = divmod(position, rows * columns)
            for part in self._checkpoint.fused[source][expert]:
                own = self._checkpoint.tensors[part]
                if inside < (count := math.prod(own.shape)):
                    found.append(self._file(own.file).elements(part, [inside]))
                    break
                inside -= count
        return torch.cat(found)

    def _file(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return self._files[path]


def leading(checkpoint: BaseFiles, source: str) -> Tensor:
    """Read a tensor's first `LEADING` elements."""
    *over, rows, columns = checkpoint.stored(source).shape
    wanted = min(rows, -(-LEADING // columns))
    read = checkpoint.expert_rows(source, 0, 0, wanted) if over else checkpoint.rows(source, 0, wanted)
    return read.flatten()[:LEADING]
