"""The launcher of the distributed tests: without it a hang would stall the tests and a failure would hide its cause."""

import time
from pathlib import Path

import pytest

from tests.distributed import launcher
from tests.distributed.launcher import RankFailure, run_ranks

CHECK = Path(__file__).parent / "workers" / "launcher_check.py"


@pytest.mark.parametrize("start", ["warm", "torchrun"])
def test_two_ranks_all_reduce_and_report(start):
    """Else no distributed test has a process group."""
    ranks = run_ranks(CHECK, 2, ["sum", "more"], launcher=start)
    assert [rank.rank for rank in ranks] == [0, 1]
    assert [rank["total"] for rank in ranks] == [3.0, 3.0]
    assert ranks[0]["world_size"] == 2
    assert ranks[0]["arguments"] == ["sum", "more"]
    assert ranks[0]["threads"] == "1"
    assert "hello from rank 1" in ranks[1].output and "hello from rank 0" not in ranks[1].output


def test_a_module_name_runs_as_well_as_a_file():
    """Else workers inside packages cannot be run."""
    (rank,) = run_ranks("tests.distributed.workers.launcher_check", 1, ["sum"])
    assert rank["total"] == 1.0


def test_two_deepspeed_ranks_all_reduce_and_report():
    """Else the launch command users type is never tested."""
    ranks = run_ranks(CHECK, 2, ["deepspeed"], launcher="deepspeed")
    assert [rank["total"] for rank in ranks] == [3.0, 3.0]
    assert [rank["argv"][1] for rank in ranks] == ["--local_rank=0", "--local_rank=1"]


def test_a_failing_rank_shows_its_traceback():
    """Else a failure says only 'exit code 1'."""
    with pytest.raises(RankFailure, match="the cat ate rank 1's batch") as failure:
        run_ranks(CHECK, 2, ["fail"])
    assert failure.value.returncode == 1
    assert "Traceback" in failure.value.ranks[1].output
    assert "the cat" not in failure.value.ranks[0].output


def test_a_hang_fails_in_time_with_every_stack_and_leaves_no_process(monkeypatch):
    """Else one unmatched collective stalls every later test."""
    folders = []
    kill_all = launcher._kill_all
    monkeypatch.setattr(launcher, "_kill_all", lambda folder: folders.append(folder) or kill_all(folder))
    began = time.monotonic()
    with pytest.raises(RankFailure, match="did not end within 25 s") as failure:
        run_ranks(CHECK, 2, ["hang"], timeout=25)
    assert time.monotonic() - began < 45
    waiting, stuck = (rank.output for rank in failure.value.ranks)
    assert "most recent call first" in waiting and "launcher_check.py" in waiting
    assert "all_reduce" in stuck and "launcher_check.py" in stuck
    assert list(launcher._processes(folders[0])) == []


def test_an_unknown_launcher_is_refused():
    """Else a typo starts something else."""
    with pytest.raises(ValueError, match="torchrun"):
        run_ranks(CHECK, 1, launcher="mpirun")
