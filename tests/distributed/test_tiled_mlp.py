"""Tiled MLPs train the same adapters on every engine, checkpointed blocks among them."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "tiled.py"
DEFAULT = ["ddp:plain", "fsdp2:checkpointing", "zero2:plain", "zero3:checkpointing"]
OTHERS = ["ddp:checkpointing", "ddp:accumulation", "fsdp2:plain", "fsdp2:accumulation"]
OTHERS += ["zero2:accumulation", "zero3:plain", "zero3:accumulation"]


@pytest.mark.parametrize("cells", [DEFAULT, pytest.param(OTHERS, marks=pytest.mark.full)], ids=["some", "others"])
def test_tiles_change_nothing_on_any_engine(cells, deepspeed_ops):
    """Engines see one gradient a parameter, however many parts it is a sum over."""
    for rank in run_ranks(WORKER, 2, cells, timeout=300):
        for cell in cells:
            seen = rank[cell]
            assert seen["masks"] and seen["allocations"] >= 10 and 0 < seen["distance"] < 1e-6, (cell, seen)
