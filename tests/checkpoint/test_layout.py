"""Who resumes opens the files that hold what it needs, however many ranks wrote the checkpoint."""

import sys
from pathlib import Path

import pytest
import torch

from adalora_scale.checkpoint import finding
from adalora_scale.checkpoint import format as files
from adalora_scale.checkpoint.flat import Group, flat_tensors
from adalora_scale.checkpoint.format import Checkpoint, CheckpointError
from adalora_scale.checkpoint.layout import piece_of, ranks_with

SHAPES = {"q.lora_A": (47, 4), "q.lora_E": (4,), "q.lora_B": (64, 4)}
WHOLE = {name: torch.rand(shape).flatten() for name, shape in SHAPES.items()}
opened: list[str] | None = None


def _hear(event, args):
    if opened is not None and event == "open" and isinstance(args[0], str | Path):
        opened.append(Path(args[0]).name)


sys.addaudithook(_hear)


def by_rows(ranks):
    """Runs of FSDP2: equal rows for each rank, the last ones fewer or none."""
    step = {name: -(-shape[0] // ranks) * (shape[1] if len(shape) == 2 else 1) for name, shape in SHAPES.items()}
    return {name: (0, each, each) for name, each in step.items()}


def flat(ranks):
    """Runs of ZeRO-1 and 2: one flat tensor of all, cut into equal partitions."""
    size = -(-sum(value.numel() for value in WHOLE.values()) // ranks)
    runs, first = {}, 0
    for name, value in WHOLE.items():
        runs[name] = (first // size, min(size - first % size, value.numel()), size)
        first += value.numel()
    return runs


def write(directory, runs, ranks, changes=None):
    directory.mkdir(parents=True)
    entries = {}
    for rank in range(ranks):
        pieces = {name: piece_of(run, rank, WHOLE[name].numel()) for name, run in runs.items()}
        intervals = [(name, *piece) for name, piece in pieces.items() if piece]
        group = Group(intervals, {"weight": [WHOLE[n][s : s + length] for n, s, length in intervals]})
        name = files.pieces_name(rank, ranks)
        tensors = flat_tensors({"adapter": group}, {"adapter": list(SHAPES)}, {"rng": torch.tensor([rank])})
        entries[name] = files.write_tensors(directory / name, tensors)
    told = {"runs": {"adapter": runs}, "kinds": {"adapter": ["weight"]}}
    content = {"step": 5, "world_size": ranks, "files": entries, "tensors": {"adapter": SHAPES}}
    files.write_manifest(directory, content | told | (changes or {}))
    return directory


def resume(directory, runs, rank, ranks, shards=None):
    """Do what a rank does of a checkpoint: verify its share, read its pieces and its random numbers."""
    checkpoint = Checkpoint(directory)
    checkpoint.verify(finding.share_of(checkpoint, rank, ranks))
    for kind in sorted(checkpoint.kinds("adapter")):
        for name, run in runs.items():
            if (piece := piece_of(run, rank % (shards or ranks), WHOLE[name].numel())) is not None:
                found = checkpoint.read("adapter", kind, name, *piece)
                assert found.equal(WHOLE[name][piece[0] : sum(piece)])
    if rank < checkpoint.world_size:
        assert checkpoint.extra(rank, "rng").item() == rank


def files_opened(directory, runs, ranks, shards=None):
    """Of every rank: how many files of the checkpoint it opens."""
    global opened
    counts = []
    for rank in range(ranks):
        opened = []
        resume(directory, runs, rank, ranks, shards)
        counts.append(len(set(opened)))
        opened = None
    return counts


@pytest.mark.parametrize(("saved", "now"), [(16, 16), (16, 8), (8, 16), (16, 1), (16, 12), (12, 5)])
@pytest.mark.parametrize("cut", [by_rows, flat])
def test_a_rank_opens_only_what_it_needs(cut, saved, now, tmp_path):
    """262,000 openings at 512 ranks, when each opened the file of every other."""
    counts = files_opened(write(tmp_path / "checkpoint-5", cut(saved), saved), cut(now), now)
    divides = saved % now == 0 or now % saved == 0
    apart = 3 + 2 * -(-saved // now)  # what it reads of large and of small tensors, and what it verifies
    assert max(counts) <= (apart if not divides else 4 if now > 1 else saved + 1)


@pytest.mark.parametrize("now", [8, 16, 32, 64, 128])
def test_a_rank_of_a_copy_opens_the_file_of_its_rows(now, tmp_path):
    """HSDP on half its nodes opened six: rows in the files of two copies, and what else it verified."""
    directory = write(tmp_path / "checkpoint-5", by_rows(8), 64)
    # Its rows, its random numbers and the manifest; what it verifies beside these is one file of 64 on half the ranks.
    assert max(files_opened(directory, by_rows(8), now, 8)) <= 2 + max(64 // now, 1)


@pytest.mark.parametrize("saved", [1, 8, 12])
@pytest.mark.parametrize("now", [1, 5, 8, 16])
@pytest.mark.parametrize("shards", [1, 4, 8])
def test_every_file_is_verified_once(saved, now, shards, tmp_path):
    """Else a damaged file is found when half of it has been read, or not at all."""
    checkpoint = Checkpoint(write(tmp_path / "checkpoint-5", by_rows(min(shards, saved)), saved))
    shares = [finding.share_of(checkpoint, rank, now) for rank in range(now)]
    assert sorted(name for share in shares for name in share) == sorted(checkpoint.files)


def test_without_runs_every_table_is_read(tmp_path):
    """Checkpoints of before stay readable, and what is opened here is what the other test counts."""
    directory = write(tmp_path / "checkpoint-5", by_rows(8), 8, {"runs": None, "kinds": None})
    assert files_opened(directory, by_rows(4), 4) == [9] * 4


def test_a_run_that_does_not_fit_the_files_is_no_zero(tmp_path):
    """A manifest that was written by hand must not make weights of what was in memory."""
    wrong = by_rows(8) | {"q.lora_B": (1, 32, 32)}
    checkpoint = Checkpoint(write(tmp_path / "checkpoint-5", by_rows(8), 8, {"runs": {"adapter": wrong}}))
    assert checkpoint.read("adapter", "weight", "q.lora_A", 3, 20).equal(WHOLE["q.lora_A"][3:23])
    with pytest.raises(CheckpointError, match=r"holds 0 of 32 elements of 'q\.lora_B'"):
        checkpoint.read("adapter", "weight", "q.lora_B", 0, 32)


@pytest.mark.parametrize("run", [(0, 4, 4), (2, 1, 5), (3, 20, 0), (0, 6, 7)])
def test_ranks_of_elements_are_those_whose_pieces_hold_them(run):
    """Else an element is looked for in the wrong file."""
    whole, world = 20, 12
    pieces = [piece_of(run, rank, whole) for rank in range(world)]
    assert sum(piece[1] for piece in pieces if piece) == whole
    for start in range(whole):
        for length in range(1, whole - start + 1):
            holders = [
                rank
                for rank, piece in enumerate(pieces)
                if piece and max(piece[0], start) < min(sum(piece), start + length)
            ]
            assert list(ranks_with(run, start, length, world)) == holders
