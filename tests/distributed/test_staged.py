"""Adapters frozen after attach, to train in stages: they stay bit for bit, or the engine that cannot do it says so."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "staged.py"


@pytest.fixture(scope="module")
def outcomes(deepspeed_ops):
    ranks = run_ranks(WORKER, 2, ["ddp", "fsdp2", "zero2"])
    return {engine: [rank[engine] for rank in ranks] for engine in ("ddp", "fsdp2", "zero2")}


@pytest.mark.shows("features", feature="adapters frozen after attach", engine="{engine}")
@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_frozen_adapter_keeps_weight_moments_and_statistics(outcomes, engine):
    """Else the penalty moves what the user froze: 27 % in two steps."""
    for rank in outcomes[engine]:
        assert rank["held"] > 0
        assert rank["frozen"]
        assert rank["other_moved"]
        assert not rank["gradient"]


@pytest.mark.refuses(
    "features", feature="adapters frozen after attach", engine="zero2",
    because="a flat partition is one parameter to its optimizer: what is frozen in it goes on moving",
)  # fmt: skip
def test_zero_refuses_by_the_parameters_name(outcomes):
    """A flat partition is one parameter to its optimizer: what is frozen in it goes on moving."""
    expected = "Unsupported: 'blocks.1.up.lora_A' was frozen (requires_grad=False) after attach"
    assert [message[: len(expected)] for message in outcomes["zero2"]] == [expected] * 2
