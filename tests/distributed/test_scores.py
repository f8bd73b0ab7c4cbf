"""Scores on sharded engines: masks of the float64 reference, and figures that are right or say nothing."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "scores_worker.py"


@pytest.fixture(scope="module")
def outputs(deepspeed_ops):
    return run_ranks(WORKER, 2, ["default", "fsdp2", "zero2"], timeout=300)


def test_a_ratio_of_only_one_group_is_not_logged(outputs):
    """Else under ZeRO with two groups the penalty of all adapters is set against the task's gradient of the first."""
    for rank in outputs:
        assert rank["zero2"]["calls"] == 2
        assert rank["zero2"]["ratio"] is None
        assert rank["fsdp2"]["ratio"] > 0
