"""Evaluation's loss is one figure, whatever ranks and batches its rows are spread over."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "evaluation.py"


def test_rows_that_ranks_cannot_share_evenly_count_once(stories260k, tmp_path):
    """Else more ranks, or another batch size, choose another best checkpoint."""
    one, two = (run_ranks(WORKER, ranks, [stories260k, tmp_path / str(ranks)], timeout=200) for ranks in (1, 2))
    expected = one[0]["losses"]
    for kind in ("tokens", "classes"):
        assert len({round(expected[f"{kind}-{size}"], 5) for size in (1, 2, 4)}) == 1
    assert expected["packed-1"] == pytest.approx(expected["tokens-1"], rel=1e-5)
    for rank in two:
        assert rank["losses"] == pytest.approx(expected, rel=1e-5)
