"""A checkpoint's files at scale: what a rank writes, and which files it opens when a run goes on on other ranks.

What a rank writes is what the real `gather` collects. Who holds the rest follows from the engine's rule for cutting a
tensor, which the rehearsed ranks' own pieces must bear out. The files that a resuming rank needs are written for real,
with tables and sparse values, and read by the real reader; one that it should not need is not there.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adalora_scale.checkpoint import finding
from adalora_scale.checkpoint import format as files
from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.checkpoint.layout import Run, piece_of, ranks_with
from adalora_scale.checkpoint.state import ADAPTER, gather
from adalora_scale.cluster.rehearsal.rank import Rehearsed

Pieces = dict[str, tuple[int, int]]
"""Tensor → (start, length)."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the ranks of a run hold the adapters."""

    world_size: int
    shapes: Mapping[str, tuple[int, ...]]
    runs: Mapping[str, Run]
    """Tensor → who writes it: of several copies the first."""
    copies: int
    """Ranks that hold the same piece."""
    kinds: Sequence[str]

    def written(self, rank: int) -> Pieces:
        """Return what a rank writes, by the rule."""
        return _pieces(self.runs, self.shapes, rank)

    def needed(self, rank: int) -> Pieces:
        """Return what a rank holds, by the rule."""
        return self.written(rank % (self.world_size // self.copies))


@dataclass(frozen=True, kw_only=True)
class Resumed:
    """What one rank does to go on from a checkpoint of another number of ranks."""

    saved: int
    """Ranks that wrote it."""
    ranks: int
    rank: int
    files: int
    """Different files that the rank opens, the manifest among them."""
    bytes: int
    """Of values that it reads."""
    manifest_bytes: int
    python_s: float


def written_by(rehearsed: Rehearsed) -> Pieces:
    """Return what the rehearsed rank writes of the adapters, from the real `gather`."""
    allocator = rehearsed.allocator
    found = gather(rehearsed.model, allocator.sharding, allocator)
    return {name: (start, length) for name, start, length in found.groups[ADAPTER].intervals if length}


def resume(saved: Layout, now: Layout, rank: int) -> Resumed:
    """Let `rank` of `now` read its pieces of a checkpoint that `saved` describes, with the real reader.

    Raises:
        CheckpointError: the reader opens a file that the rank does not need.
    """
    own = now.needed(rank)
    holders = {n for name, piece in own.items() for n in ranks_with(saved.runs[name], *piece, saved.world_size)}
    if rank < saved.world_size:
        holders.add(rank)  # its random numbers
    with tempfile.TemporaryDirectory(prefix="adalora_rehearsal_") as name:
        folder = Path(name)
        for holder in sorted(holders):
            _write_pieces(folder / files.pieces_name(holder, saved.world_size), saved, holder)
        entry = {"bytes": 0, "sha256": "0" * 64}
        content = {
            "step": 1,
            "world_size": saved.world_size,
            "tensors": {ADAPTER: saved.shapes},
            "runs": {ADAPTER: saved.runs},
            "kinds": {ADAPTER: sorted(saved.kinds)},
            "files": {files.pieces_name(n, saved.world_size): entry for n in range(saved.world_size)},
        }
        files.write_manifest(folder, content)
        begun = time.thread_time()
        checkpoint = Checkpoint(folder)
        share = finding.share_of(checkpoint, rank, now.world_size)
        read = 0
        for kind in sorted(checkpoint.kinds(ADAPTER)):
            for tensor, (start, length) in own.items():
                found = checkpoint.read(ADAPTER, kind, tensor, start, length)
                read += 0 if found is None else found.nbytes
        checkpoint.extra(rank, "rng.torch") if rank < saved.world_size else None
        seconds = time.thread_time() - begun
        return Resumed(
            saved=saved.world_size,
            ranks=now.world_size,
            rank=rank,
            files=len({*share, *checkpoint.opened}) + 1,
            bytes=read,
            manifest_bytes=(folder / files.MANIFEST_NAME).stat().st_size,
            python_s=seconds,
        )


def _pieces(runs: Mapping[str, Run], shapes: Mapping[str, tuple[int, ...]], rank: int) -> Pieces:
    found = {name: piece_of(run, rank, math.prod(shapes[name])) for name, run in runs.items()}
    return {name: piece for name, piece in found.items() if piece is not None}


def _write_pieces(path: Path, layout: Layout, rank: int) -> None:
    """Write a safetensors file with a rank's table, and values that take no space on the disk."""
    number = {name: index for index, name in enumerate(layout.shapes)}
    rows = [(number[name], *piece) for name, piece in layout.written(rank).items()]
    elements, end = sum(length for _, _, length in rows), 24 * len(rows)
    header = {f"{ADAPTER}.intervals": {"dtype": "I64", "shape": [len(rows), 3], "data_offsets": [0, end]}}
    for kind in sorted(layout.kinds):
        offsets = [end, end + 4 * elements]
        header[f"{ADAPTER}.{kind}"] = {"dtype": "F32", "shape": [elements], "data_offsets": offsets}
        end = offsets[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for row in rows:
            file.write(struct.pack("<3q", *row))
        file.truncate(8 + len(text) + end)
