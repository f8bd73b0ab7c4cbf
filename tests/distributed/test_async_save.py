"""Checkpoints written while several ranks train: the same bytes on every engine, and one rank's full disk ends all."""

import errno
import os
from pathlib import Path

import pytest

from adalora_scale.checkpoint.format import Checkpoint
from tests.distributed.launcher import run_ranks
from tests.distributed.workers import async_save as worker

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.shows("features", feature="asynchronous checkpoints", engine=lambda given: given["engines"])
@pytest.mark.parametrize(
    ("ranks", "engines"),
    [
        (2, ("fsdp2", "zero2", "zero3")),
        pytest.param(2, ("ddp", "zero1"), marks=pytest.mark.full),
        pytest.param(4, ENGINES, marks=pytest.mark.full),
    ],
)
def test_every_engine_writes_the_bytes_of_the_step_while_training_goes_on(ranks, engines, tmp_path, deepspeed_ops):
    """Flat partitions are views of live memory, and so are DTensors: a view in place of a copy has the next weights."""
    env = {"DS_ACCELERATOR": "cpu"}
    outcomes = run_ranks(Path(worker.__file__), ranks, [tmp_path, *engines], timeout=400, env=env)
    for engine in engines:
        stopped, going = content(tmp_path / engine / "stopped"), content(tmp_path / engine / "going")
        assert stopped.keys() == going.keys() and len(stopped) == len(worker.AT) * (ranks + 2)
        assert [name for name in stopped if stopped[name] != going[name]] == [], engine
        Checkpoint(tmp_path / engine / "going" / f"checkpoint-{max(worker.AT)}").verify()
        ends = [outcome[engine] for outcome in outcomes]
        assert all(end == ends[0] for end in ends)
        assert os.strerror(errno.EFBIG) in ends[0]["raised"] and "(rank 1)" in ends[0]["raised"]
        assert ends[0]["left"] == ["checkpoint-1"]  # the one before, and nothing half written
