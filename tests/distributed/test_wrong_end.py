"""All ranks end a run that trains nothing, at the same step and with the name of a tensor that one of them holds."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import ROOT
from tests.distributed.launcher import RankFailure, run_ranks

TRAIN = ROOT / "launch" / "train.py"
QUICKSTART = ROOT / "launch" / "quickstart"
NAME = "model.layers.2.mlp.down_proj.weight"
OPTIONS = [
    "--config", ROOT / "configs" / "recipes" / "quickstart.yaml", f"data.train={QUICKSTART / 'data/train.jsonl'}",
    "data.eval=null", "data.max_train_samples=128", "training.per_device_train_batch_size=4", "training.max_steps=30",
    "training.max_skipped_steps=3", "training.save_steps=2", "adalora.tinit=2", "adalora.tfinal=4",
]  # fmt: skip
ENGINES = {
    "ddp": ("torchrun", ["model.load_in_4bit=false"]),
    "fsdp2": ("torchrun", ["engine.name=fsdp2", "model.load_in_4bit=false"]),
    "zero2": ("deepspeed", ["--deepspeed", ROOT / "configs/deepspeed/zero2.json", "model.load_in_4bit=false"]),
    "zero3": ("deepspeed", ["--deepspeed", ROOT / "configs/deepspeed/zero3.json", "model.load_in_4bit=false"]),
}


def spoiled_base(folder):
    """Copy the quickstart's base with a weight that is not finite: the last rank's, where parts are shared out."""
    base = shutil.copytree(QUICKSTART / "base_model", folder / "base")
    tensors = load_file(base / "model.safetensors")
    tensors[NAME][-1, -1] = float("nan")
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    return base


@pytest.mark.shows("features", feature="a wrong end is an error on every rank", engine="{engine}")
@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(e, marks=pytest.mark.full) for e in ENGINES if e != "fsdp2")]
)
def test_every_rank_stops_and_says_which_weight_is_bad(tmp_path, request, engine):
    """A rank that goes on alone waits in its next collective for half an hour."""
    launcher, more = ENGINES[engine]
    if launcher == "deepspeed":
        request.getfixturevalue("deepspeed_ops")
    base, out = spoiled_base(tmp_path), tmp_path / "out"
    arguments = [*OPTIONS, *more, f"model.model_name_or_path={base}", f"training.output_dir={out}"]
    with pytest.raises(RankFailure) as failed:
        run_ranks(TRAIN, 2, arguments, launcher=launcher, timeout=200, env={"DS_ACCELERATOR": "cpu"})
    said = str(failed.value)
    assert "training stopped at step 3: the last 3 steps had no finite gradient" in said, said
    assert NAME.removesuffix(".weight") in said and "of the base model is not finite" in said
    assert "Traceback" not in "".join(rank.output for rank in failed.value.ranks)
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-2"]
    assert (out / "wrong-end.json").exists() and not (out / "adapter_model.safetensors").exists()


@pytest.mark.full
def test_a_base_that_is_quantised_while_it_loads_is_refused(tmp_path):
    """In 4 bits a NaN is a number like any other, and nothing says later that it was none."""
    arguments = [*OPTIONS, "engine.name=fsdp2", f"model.model_name_or_path={spoiled_base(tmp_path)}"]
    with pytest.raises(RankFailure) as failed:
        run_ranks(TRAIN, 2, [*arguments, f"training.output_dir={tmp_path / 'out'}"], timeout=200)
    assert f"'{NAME}' of the base model has values that are not finite" in str(failed.value)


@pytest.mark.full
def test_what_pads_a_partition_is_no_weight(tmp_path, deepspeed_ops):
    """ZeRO-3 pads the last partitions with what was in memory: NaN, where torch fills new memory on purpose."""
    arguments = [*OPTIONS, *ENGINES["zero3"][1], "training.full_determinism=true", "adalora.init_r=7"]
    arguments += ["training.max_steps=16", "adalora.target_r=3", f"training.output_dir={tmp_path / 'out'}"]
    run_ranks(TRAIN, 2, arguments, launcher="deepspeed", timeout=200, env={"DS_ACCELERATOR": "cpu"})
    assert (tmp_path / "out" / "run.json").exists()
