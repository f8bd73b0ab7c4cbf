"""Scores on sharded engines: masks of the float64 reference, and figures that are right or say nothing."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "scores_worker.py"


@pytest.fixture(scope="module")
def outputs(deepspeed_ops):
    return run_ranks(WORKER, 2, ["taylor", "fsdp2", "zero2"], timeout=300)


@pytest.mark.parametrize("engine", ["fsdp2", "zero2"])
def test_a_score_of_lambda_alone_has_the_references_masks(outputs, engine):
    """Else a score that keeps nothing of A and B is added up over the wrong spans, or a rank's part is lost."""
    for rank in outputs:
        assert rank[engine]["verdict"] == "pass", rank[engine]["reason"]
        assert rank[engine]["allocations"] >= 10
        assert len({sum(row) for row in rank[engine]["last_mask"].values()}) > 1


def test_a_ratio_of_only_one_group_is_not_logged(outputs):
    """Else under ZeRO with two groups the penalty of all adapters is set against the task's gradient of the first."""
    for rank in outputs:
        assert rank["zero2"]["calls"] == 2
        assert rank["zero2"]["ratio"] is None
        assert rank["fsdp2"]["ratio"] > 0
