"""A gradient that is not finite on one rank changes nothing on any: weights, moments, Ī and Ū stay bit for bit."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "nonfinite.py"
# DeepSpeed 0.19.8 drops such a step itself in float32 and in BF16_Optimizer; in bf16 ZeRO-2 hands it on.
TWO_RANKS = ["ddp:plain", "fsdp2:plain", "zero2:plain", "zero2:bf16", "zero1:bf16", "zero3:plain", "zero3:bf16"]
CELLS = [*TWO_RANKS, "hsdp:plain"]


@pytest.fixture(scope="module")
def outputs(deepspeed_ops):
    two, four = run_ranks(WORKER, 2, TWO_RANKS, timeout=300), run_ranks(WORKER, 4, ["hsdp:plain"], timeout=300)
    return {cell: [rank[cell] for rank in (two if cell in TWO_RANKS else four)] for cell in CELLS}


@pytest.mark.parametrize("cell", CELLS)
def test_nan_on_one_rank_changes_nothing_anywhere(outputs, cell):
    """Else momentum moves the weights of the other ranks, or Ī and Ū stay NaN for the rest of the run."""
    for rank in outputs[cell]:
        assert rank["momentum"] > 0
        assert rank["changed"] == []


@pytest.mark.parametrize("cell", CELLS)
def test_the_step_counts_and_training_goes_on(outputs, cell):
    """Else one bad batch ends the run, or shifts the pruning schedule against the learning rate's."""
    for rank in outputs[cell]:
        assert rank["step"] == 6
        assert rank["skipped"] == 1
        assert rank["unchanged_later"] == []
        assert rank["not_finite"] == []
