"""The checkpoint's files: any interval comes back from whichever files hold it, and damage never goes unseen."""

import hashlib
import itertools
import random
import re
import shutil

import pytest
import torch

from adalora_scale.checkpoint import format as files
from adalora_scale.checkpoint.flat import Group, flat_tensors
from adalora_scale.checkpoint.format import Checkpoint, CheckpointError

SHAPES = {"q.lora_A": (10, 3), "q.lora_E": (3,), "q.lora_B": (7, 3)}
WHOLE = {
    kind: {name: torch.rand(shape) for name, shape in SHAPES.items()} for kind in ("weight", "exp_avg", "sensitivity")
}


def cut(flat_size, cuts):
    """Split the concatenation of all tensors at `cuts` and return each rank's intervals."""
    edges, result = [0, *cuts, flat_size], []
    for low, high in itertools.pairwise(edges):
        intervals, offset = [], 0
        for name, shape in SHAPES.items():
            size = torch.Size(shape).numel()
            start, end = max(low - offset, 0), min(high - offset, size)
            if start < end:
                intervals.append((name, start, end - start))
            offset += size
        result.append(intervals)
    return result


def write(directory, cuts=(17, 40), step=5, **changes):
    """Write a checkpoint as three ranks would that own flat pieces of one buffer."""
    directory.mkdir(parents=True)
    pieces = cut(sum(torch.Size(shape).numel() for shape in SHAPES.values()), cuts)
    entries = {}
    for rank, intervals in enumerate(pieces):
        values = {k: [WHOLE[k][n].flatten()[s : s + length] for n, s, length in intervals] for k in WHOLE}
        name = files.pieces_name(rank, len(pieces))
        extras = {"rng": torch.tensor([rank], dtype=torch.uint8)}
        group = {"adapter": Group(intervals, values)}
        entries[name] = files.write_tensors(directory / name, flat_tensors(group, {"adapter": list(SHAPES)}, extras))
    (directory / "trainer_state.json").write_text('{"global_step": 5}\n')
    entries["trainer_state.json"] = files.file_entry(directory / "trainer_state.json")
    content = {"step": step, "world_size": len(pieces), "files": entries, "tensors": {"adapter": SHAPES}}
    files.write_manifest(directory, content | changes)
    return directory


@pytest.mark.parametrize("cuts", [(), (17, 40), (1, 2, 30, 33, 53), (30, 33)])
def test_any_interval_comes_back(tmp_path, cuts):
    """Else another engine or number of ranks reads other weights than were written."""
    checkpoint = Checkpoint(write(tmp_path / "checkpoint-5", cuts))
    checkpoint.verify()
    assert checkpoint.kinds("adapter") == set(WHOLE) and checkpoint.shapes("adapter") == SHAPES
    for name, shape in SHAPES.items():
        for kind, tensors in WHOLE.items():
            assert checkpoint.read_whole("adapter", kind, name).equal(tensors[name])
            size = torch.Size(shape).numel()
            for start in range(size):
                for length in range(size - start + 1):
                    found = checkpoint.read("adapter", kind, name, start, length)
                    assert found.equal(tensors[name].flatten()[start : start + length])
        assert checkpoint.read("adapter", "momentum_buffer", name, 0, 3) is None
    assert [checkpoint.extra(rank, "rng").item() for rank in range(len(cuts) + 1)] == list(range(len(cuts) + 1))
    assert checkpoint.extra(0, "cuda") is None


def test_every_flip_and_every_cut_is_seen(tmp_path):
    """A flipped bit in a moment would otherwise show only as a slightly worse model."""
    source, draw = write(tmp_path / "checkpoint-5"), random.Random(0)
    paths = sorted(source.iterdir())
    for trial in range(200):
        victim = tmp_path / f"damaged-{trial}"
        shutil.copytree(source, victim)
        path = victim / paths[trial % len(paths)].name
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content))
        if trial % 4 == 3:
            content = content[:place]
        else:
            content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=re.escape(str(path))):
            Checkpoint(victim).verify()
        shutil.rmtree(victim)


def test_missing_files_are_named(tmp_path):
    """A rank file that was not copied must not become a tensor of zeros."""
    directory = write(tmp_path / "checkpoint-5")
    (directory / files.pieces_name(1, 3)).unlink()
    with pytest.raises(CheckpointError, match=r"pieces-00001-of-00003\.safetensors is missing"):
        Checkpoint(directory).verify()
    (directory / files.MANIFEST_NAME).unlink()
    with pytest.raises(CheckpointError, match="not complete"):
        Checkpoint(directory)


def test_a_gap_between_the_files_is_no_zero(tmp_path):
    """Files that do not belong together must not read as weights."""
    directory = write(tmp_path / "checkpoint-5")
    other = write(tmp_path / "other", cuts=(20, 40))
    name = files.pieces_name(1, 3)
    shutil.copy(other / name, directory / name)
    with pytest.raises(CheckpointError, match="do not belong together"):
        Checkpoint(directory).read_whole("adapter", "weight", "q.lora_A")


def test_a_newer_version_says_so(tmp_path, monkeypatch):
    """An old program must not guess at files it does not know."""
    monkeypatch.setattr(files, "VERSION", 2)
    directory = write(tmp_path / "checkpoint-5")
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match=r"version 2.*reads up to 1.*install a newer"):
        Checkpoint(directory)


def test_only_complete_checkpoints_are_listed_newest_first(tmp_path):
    """`auto` must never take a half one, nor 9 for newer than 10."""
    for step in (9, 10, 100):
        write(tmp_path / f"checkpoint-{step}", step=step)
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / ".checkpoint-300.partial").mkdir()
    assert [path.name for path in files.checkpoints(tmp_path)] == ["checkpoint-100", "checkpoint-10", "checkpoint-9"]
    files.remove(tmp_path / "checkpoint-100")
    assert not (tmp_path / "checkpoint-100").exists()
    files.publish(write(tmp_path / ".checkpoint-11.partial", step=11), tmp_path / "checkpoint-11")
    assert files.checkpoints(tmp_path)[0].name == "checkpoint-11"


def test_the_checksum_covers_the_manifest_itself(tmp_path):
    """Else shapes, masks and the position could change unseen."""
    directory = write(tmp_path / "checkpoint-5")
    path = directory / files.MANIFEST_NAME
    text = path.read_text()
    found = re.search(r'"checksum": "(\w{64})"', text).group(1)
    assert found == hashlib.sha256(text.replace(found, "0" * 64).encode()).hexdigest()
    path.write_text(text.replace('"step": 5', '"step": 6'))
    with pytest.raises(CheckpointError, match="damaged"):
        Checkpoint(directory)
