"""A run of 14 steps of the quickstart, and what two runs must have in common to be the same."""

import json

from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.config import load_config
from tests.conftest import ROOT

RECIPE = ROOT / "configs" / "recipes" / "quickstart.yaml"
STEPS, FINAL = 14, 10
BASE = [
    f"training.max_steps={STEPS}", "training.logging_steps=3", "training.save_steps=2", "training.save_total_limit=20",
    "training.eval_strategy=no", "adalora.tinit=2", "adalora.tfinal=4", "adalora.deltaT=2", "adalora.init_r=6",
    "adalora.target_r=4", "adalora.lora_dropout=0.1", "data.max_train_samples=64", "data.max_eval_samples=8",
    "training.per_device_train_batch_size=4", "training.gradient_accumulation_steps=2",
]  # fmt: skip
"""An epoch is 8 steps; log lines lie across checkpoints; dropout draws random numbers."""


def config(folder, *overrides):
    return load_config(RECIPE, [*BASE, f"training.output_dir={folder}", *overrides])


def records(path):
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in rows]


def assert_same(folder, straight):
    adapter = "adapter_model.safetensors"
    assert (folder / adapter).read_bytes() == (straight / adapter).read_bytes()
    for name in ("metrics.jsonl", "ranks.jsonl", "scores.jsonl"):
        assert records(folder / name) == records(straight / name)
    last = [Checkpoint(path / f"checkpoint-{STEPS}") for path in (folder, straight)]
    for kind in last[0].kinds("adapter"):
        for name in last[0].shapes("adapter"):
            assert last[0].read_whole("adapter", kind, name).equal(last[1].read_whole("adapter", kind, name))
