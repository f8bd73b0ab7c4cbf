"""round_robin_gradients through DeepSpeed's launcher: the run that was once silently wrong ends as one process does."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.distributed.launcher import run_ranks

TRAIN = ROOT / "launch" / "train.py"
OPTIONS = [
    "--config", str(ROOT / "configs" / "recipes" / "quickstart.yaml"), "model.load_in_4bit=false",
    f"model.model_name_or_path={ROOT / 'launch/quickstart/base_model'}", "data.eval=null", "data.max_train_samples=512",
    f"data.train={ROOT / 'launch/quickstart/data/train.jsonl'}", "adalora.modules_to_save=[model.norm]",
    "adalora.init_r=6", "adalora.target_r=4", "adalora.tinit=2", "adalora.tfinal=4", "adalora.deltaT=2",
    "training.max_steps=14", "training.warmup_steps=2", "training.weight_decay=0.01", "training.save_strategy=no",
]  # fmt: skip


def ended(folder):
    """Return the adapter of a run and its allocations."""
    ranks = [json.loads(line) for line in (folder / "ranks.jsonl").read_text().splitlines()]
    patterns = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    return load_file(folder / "adapter_model.safetensors"), ranks, patterns


@pytest.mark.full
def test_a_launched_run_with_round_robin_saves_the_adapter_of_one_process(tmp_path, deepspeed_ops):
    """Else ranks prune and save other triplets than the model computes with, and every check passes.

    A trained norm has no weight decay, so the optimizer has two parameter groups.
    """
    zero = json.loads((ROOT / "configs" / "deepspeed" / "zero2.json").read_text())
    zero["zero_optimization"]["round_robin_gradients"] = True
    (tmp_path / "zero.json").write_text(json.dumps(zero))
    one, two = tmp_path / "one", tmp_path / "two"
    alone = [sys.executable, TRAIN, *OPTIONS, f"training.output_dir={one}", "training.per_device_train_batch_size=64"]
    done = subprocess.run(
        alone, capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launched = [*OPTIONS, "--deepspeed", tmp_path / "zero.json", f"training.output_dir={two}"]
    run_ranks(TRAIN, 2, launched, launcher="deepspeed", timeout=400, env={"DS_ACCELERATOR": "cpu"})
    expected, allocations, patterns = ended(one)
    found, launched_allocations, launched_patterns = ended(two)
    assert json.loads((two / "run.json").read_text())["engine"] == "zero2"
    assert len(allocations) == 4 and launched_allocations == allocations
    assert launched_patterns == patterns
    assert found.keys() == expected.keys()
    assert any("norm" in key for key in found)
    flat = [torch.cat([tensors[key].flatten() for key in sorted(tensors)]) for tensors in (found, expected)]
    assert (flat[0] - flat[1]).norm() <= 1e-5 * flat[1].norm()
