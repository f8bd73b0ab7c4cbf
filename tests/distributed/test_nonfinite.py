"""A gradient that is not finite on one rank changes nothing on any: weights, moments, Ī and Ū stay bit for bit."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "nonfinite.py"
# DeepSpeed 0.19.8 drops such a step itself in float32 and in BF16_Optimizer; in bf16 ZeRO-2 hands it on.
TWO_RANKS = ["ddp:plain", "fsdp2:plain", "zero2:plain", "zero2:bf16", "zero1:bf16", "zero3:plain", "zero3:bf16"]
LAST = ["fsdp2:plain:last", "zero2:plain:last", "zero2:bf16:last"]
CELLS = [*TWO_RANKS, "hsdp:plain"]


@pytest.fixture(scope="module")
def outputs(deepspeed_ops):
    two = run_ranks(WORKER, 2, [*TWO_RANKS, *LAST], timeout=300)
    four = run_ranks(WORKER, 4, ["hsdp:plain"], timeout=300)
    return {cell: [rank[cell] for rank in (four if cell == "hsdp:plain" else two)] for cell in [*CELLS, *LAST]}


@pytest.mark.shows(
    "features",
    feature="a step that is not finite changes nothing, on any rank",
    engine=lambda given: given["cell"].partition(":")[0],
)
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


@pytest.mark.parametrize("cell", LAST)
def test_a_run_that_ends_on_nan_is_pruned_all_the_same(outputs, cell):
    """Else it ends with every λ alive, in the masters or in the copies that the forward computes with."""
    for rank in outputs[cell]:
        assert rank["frozen"]
        assert rank["step"] == 24
        assert rank["kept"] == rank["masters"]
        assert 0.95 * rank["budget"] < rank["spent"] <= rank["budget"]
        assert rank["copies"] in (None, rank["kept"])
    assert len({rank["digest"] for rank in outputs[cell]}) == 1
