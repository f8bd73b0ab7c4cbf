"""Configs of runs over a 4-bit base, and small checkpoints to load."""

import pytest

from adalora_scale.config import DataConfig, ModelConfig, RunConfig


@pytest.fixture
def run_config(tmp_path):
    def make(path, *, task="causal_lm", **model):
        options = {"torch_dtype": "float32", "bnb_4bit_compute_dtype": "float32"} | model
        return RunConfig(
            model=ModelConfig(model_name_or_path=str(path), **options),
            data=DataConfig(train="unused"),
            training={"output_dir": str(tmp_path / "run")},
            task=task,
        )

    return make
