"""Stock trainers with AdaLoraCallback save adapters under every engine, or say why not."""

import pytest

from tests.conftest import ROOT
from tests.distributed.launcher import run_ranks

WORKER = ROOT / "tests" / "distributed" / "workers" / "stock_saving.py"
pytestmark = pytest.mark.full


@pytest.mark.shows("features", feature="save_model and checkpoints of a stock trainer", engine="{mode}")
@pytest.mark.parametrize("mode", ["ddp", "fsdp2", "zero2", "zero3"])
def test_saving_leaves_adapters_with_the_masters_values_and_no_base(stories260k, tmp_path, mode, request):
    """Else every checkpoint is a whole model that nothing loads, or an adapter rounded to the forward's bits."""
    if mode.startswith("zero"):
        request.getfixturevalue("deepspeed_ops")
    ranks = run_ranks(WORKER, 2, [mode, stories260k, tmp_path])
    assert [rank["refused"] for rank in ranks] == ["", ""]
    found = ranks[0]
    folders = ["", "after/", "checkpoint-10/", "checkpoint-5/", "ours/"]
    assert found["files"] == sorted(f"{folder}adapter_model.safetensors" for folder in folders)
    assert found["base"] == []
    assert found["last"] and found["after"] and found["early"]
    assert all((rank["sharded"] > 0) == (mode == "fsdp2") for rank in ranks), "the engine is another"
    # One gathering a checkpoint and one at the end: each is a collective for every matrix of the model.
    assert all(rank["gathered"] == [5, 10, 10] for rank in ranks)


def test_a_save_model_that_writes_nothing_is_named(stories260k, tmp_path):
    """transformers writes nothing where FSDP's state dicts are shards, and says nothing."""
    ranks = run_ranks(WORKER, 2, ["sharded", stories260k, tmp_path])
    assert ranks[0]["files"] == ["adapter_model.safetensors", "ours/adapter_model.safetensors"]
    assert ranks[0]["base"] == [] and ranks[0]["after"] and ranks[0]["sharded"] > 0
    said = [line for rank in ranks for line in rank.output.splitlines() if "state_dict_type" in line]
    assert len(said) == 1 and "=SHARDED_STATE_DICT: trainer.save_model writes nothing" in said[0]


def test_checkpoints_that_would_hold_the_base_are_refused(stories260k, tmp_path, deepspeed_ops):
    """Else a run over a 70 B base fills the disk with it, and cannot be resumed from what it wrote."""
    for rank in run_ranks(WORKER, 2, ["whole", stories260k, tmp_path]):
        assert "save_only_model=True" in rank["refused"]
