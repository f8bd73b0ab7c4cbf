"""A run whose work is done ends with exit code 0, whatever gloo's threads still hold."""

from __future__ import annotations

from pathlib import Path

from tests.distributed.launcher import run_ranks


def test_leaving_waits_for_gloos_threads():
    (rank,) = run_ranks(Path(__file__).parent / "workers" / "leaving.py", 1)
    assert rank.values == {"at_work": True, "left": True, "at_rest": True}
