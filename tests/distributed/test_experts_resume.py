"""Runs over experts continue: bit for bit on the same ranks, by the equivalence criterion on another engine."""

from pathlib import Path

import pytest
import torch

from adalora_scale.verify.matrix import ALL_TOLERANCE, TENSOR_TOLERANCE, expected_outcome
from tests.distributed.launcher import run_ranks
from tests.distributed.workers import experts_resume as worker

WORKER = Path(worker.__file__)
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def trained(tmp_path_factory, deepspeed_ops):
    """Train on an engine, from the start or from a checkpoint of another run: what rank 0 reported, and the folder."""
    folder = tmp_path_factory.mktemp("experts")
    runs = {}

    def run(engine, ranks, preset, source=None, step="start", built="wide"):
        key = engine, ranks, preset, source, step, built
        if key not in runs:
            expected = folder / f"{preset}.pt"
            if not expected.exists():
                torch.save(expected_outcome("plain", worker.problem_of(preset, 1)), expected)
            own = folder / f"{engine}-{ranks}-{preset}" if source is None else source
            outputs = run_ranks(WORKER, ranks, [engine, preset, own, expected, step, built], timeout=300)
            assert all(output["digest"] == outputs[0]["digest"] for output in outputs)
            runs[key] = outputs[0], own
        return runs[key]

    return run


def assert_as_the_reference(seen):
    assert seen["masks"]
    assert seen["together"] <= ALL_TOLERANCE and seen["worst"] <= TENSOR_TOLERANCE


@pytest.mark.parametrize("step", [worker.DURING, worker.AFTER])
@pytest.mark.parametrize(("engine", "ranks"), [("fsdp2", 2), ("zero3", 3), ("zero2", 3)])
def test_the_same_ranks_continue_bit_for_bit(trained, engine, ranks, step):
    """Else a run that was killed is another run: experts' moments, statistics and masks are in pieces."""
    whole, folder = trained(engine, ranks, "paper")
    assert_as_the_reference(whole)
    assert trained(engine, ranks, "paper", folder, step)[0]["digest"] == whole["digest"]


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("step", [worker.DURING, worker.AFTER])
@pytest.mark.parametrize(
    ("source", "target"), [(("fsdp2", 2), ("zero3", 3)), (("zero3", 3), ("ddp", 2)), (("zero2", 3), ("fsdp2", 2))]
)
def test_another_engine_continues_to_the_same_adapter(trained, source, target, step, preset):
    """Else experts are cut where the other engine does not look."""
    _, folder = trained(*source, preset)
    assert_as_the_reference(trained(*target, preset, folder, step)[0])


@pytest.mark.parametrize(("source", "target"), [(("fsdp2", 2), ("zero3", 3)), (("zero3", 3), ("fsdp2", 2))])
def test_another_engine_continues_at_pruned_ranks(trained, source, target):
    """Else padding of one expert is another's triplet where the file's pieces are cut elsewhere."""
    whole, folder = trained(*source, "paper")
    seen = trained(*target, "paper", folder, worker.AFTER, "compact")[0]
    assert seen["widths"] > 1 and seen["spent"] == whole["spent"] and seen["masks"]
    assert seen["squares"] == pytest.approx(whole["squares"], rel=1e-6)
