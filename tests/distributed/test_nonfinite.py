"""A gradient that is not finite on one rank changes nothing on any: weights, moments, Ī and Ū stay bit for bit."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "nonfinite.py"
# DeepSpeed 0.19.8 drops such a step itself in float32 and in BF16_Optimizer; in bf16 ZeRO-2 hands it on.
CELLS = ["ddp:plain", "fsdp2:plain", "zero2:plain", "zero2:bf16", "zero1:bf16", "zero3:plain", "zero3:bf16"]


@pytest.fixture(scope="module")
def outputs(deepspeed_ops):
    return run_ranks(WORKER, 2, CELLS, timeout=300)


@pytest.mark.parametrize("cell", CELLS)
def test_nan_on_one_rank_changes_nothing_anywhere(outputs, cell):
    """Else momentum moves the weights of the other ranks, or Ī and Ū stay NaN for the rest of the run."""
    for rank in outputs:
        assert rank[cell]["momentum"] > 0
        assert rank[cell]["changed"] == []


@pytest.mark.parametrize("cell", CELLS)
def test_the_step_counts_and_training_goes_on(outputs, cell):
    """Else one bad batch ends the run, or shifts the pruning schedule against the learning rate's."""
    for rank in outputs:
        assert rank[cell]["step"] == 6
        assert rank[cell]["skipped"] == 1
        assert rank[cell]["unchanged_later"] == []
        assert rank[cell]["not_finite"] == []
