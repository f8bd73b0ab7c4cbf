"""Stock trainers with AdaLoraCallback save adapters under every engine, or say why not."""

import pytest

from tests.conftest import ROOT
from tests.distributed.launcher import run_ranks

WORKER = ROOT / "tests" / "distributed" / "workers" / "stock_saving.py"
pytestmark = pytest.mark.full


@pytest.mark.shows("features", feature="save_model and checkpoints of a stock trainer", engine="{mode}")
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero2", "zero3"])
def test_saving_leaves_adapters_with_the_masters_values_and_no_base(stories260k, tmp_path, mode, deepspeed_ops):
    """Else every checkpoint is a whole model that nothing loads, or an adapter rounded to the forward's bits."""
    ranks = run_ranks(WORKER, 2, [mode, stories260k, tmp_path])
    assert [rank["refused"] for rank in ranks] == ["", ""]
    found = ranks[0]
    folders = ["", "after/", "checkpoint-10/", "checkpoint-5/", "ours/"]
    assert found["files"] == sorted(f"{folder}adapter_model.safetensors" for folder in folders)
    assert found["base"] == []
    assert found["last"] and found["after"] and found["early"]


def test_checkpoints_that_would_hold_the_base_are_refused(stories260k, tmp_path, deepspeed_ops):
    """Else a run over a 70 B base fills the disk with it, and cannot be resumed from what it wrote."""
    for rank in run_ranks(WORKER, 2, ["whole", stories260k, tmp_path]):
        assert "save_only_model=True" in rank["refused"]
