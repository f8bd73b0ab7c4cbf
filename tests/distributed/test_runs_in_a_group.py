"""Runs in one process group do not hear each other's stop, and none saves what its ranks do not agree on."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks
from tests.distributed.workers import runs_in_a_group


@pytest.fixture(scope="module")
def ranks(stories260k, data_dir, tmp_path_factory):
    """What each of two ranks reported of every run, in one start."""
    arguments = [stories260k, data_dir, tmp_path_factory.mktemp("group")]
    return run_ranks(Path(runs_in_a_group.__file__), 2, arguments, timeout=300)


def test_a_stop_ends_its_own_run_and_no_later_one(ranks):
    """Else every run after a stopped one in the same processes ends at the first one's last step."""
    assert [(rank["stopped"]["ended"], rank["stopped"]["step"]) for rank in ranks] == [("interrupted", 7)] * 2
    assert [(rank["next"]["ended"], rank["next"]["step"]) for rank in ranks] == [("trained", 16)] * 2


def test_ranks_that_drifted_apart_write_no_checkpoint(ranks):
    """Else a damaged replica replaces the last good checkpoint, whatever guard_every is (100 here)."""
    for rank in ranks:
        run = rank["drifted"]
        assert run["ended"] == "refused" and run["step"] == 8
        assert run["said"].startswith("step 8: 'model.layers.0.") and "on rank 1 differs from rank 0" in run["said"]
        assert run["after"] == run["before"] and {name.split("/")[0] for name in run["after"]} == {"checkpoint-4"}
        assert not run["saved"]


def test_ranks_that_drifted_apart_save_no_adapter_at_the_end(ranks):
    """Else a run without checkpoints ends with rank 0's adapter as if nothing had happened."""
    assert [(rank["at_end"]["ended"], rank["at_end"]["step"]) for rank in ranks] == [("refused", 16)] * 2
    assert not any(rank["at_end"]["saved"] for rank in ranks)


def test_guard_every_zero_never_compares(ranks):
    """Else the documented way to switch the guard off does not."""
    assert [(rank["unguarded"]["ended"], rank["unguarded"]["saved"]) for rank in ranks] == [("trained", True)] * 2
