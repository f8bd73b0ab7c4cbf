"""What a run draws depends on its seed and on the model's shape, not on how its base comes into memory."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModel, LlamaForCausalLM, TrainingArguments

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.config import AdaLoraConfig, DataConfig, ModelConfig, RunConfig
from adalora_scale.engines.replicated import OneProcess
from adalora_scale.placing.model import place_model
from tests.architectures.small import small_config, small_model

TASKS = {"llama": "causal_lm", "mamba": "causal_lm", "mamba2": "causal_lm", "git": "causal_lm",
         "diffllama": "sequence_classification", "bert": "sequence_classification"}  # fmt: skip
"""Mamba and Mamba 2 draw while transformers loads them, GIT and DiffLlama while they are built."""


def drawn(folder, task: str, *, seed: int = 7, stir: int = 0, **model):
    """Return every value that was drawn: new heads and adapters."""
    config = RunConfig(
        model=ModelConfig(model_name_or_path=str(folder), **model),
        data=DataConfig(train=""),
        adalora=AdaLoraConfig(init_r=2, target_r=1),
        training={"output_dir": str(folder / "out")},
        task=task,
    )
    labels = ["no", "so", "yes"] if task == "sequence_classification" else None
    arguments = TrainingArguments(output_dir=str(folder / "out"), use_cpu=True, report_to=[], seed=seed)
    torch.manual_seed(stir)
    placed = place_model(config, OneProcess(), arguments, label_names=labels)
    values = {name: p.detach() for name, p in placed.named_parameters() if p.requires_grad}
    assert any(True for _ in adapter_layers(placed))
    return values


@pytest.mark.parametrize("model_type", TASKS)
def test_adapters_and_heads_are_the_same_however_the_base_is_loaded(tmp_path, model_type):
    """Else FSDP2 and a 4-bit base begin from other adapters than one process with the same seed."""
    task = TASKS[model_type]
    causal = task == "causal_lm"
    base = small_model(model_type, "causal") if causal else AutoModel.from_config(small_config(model_type))
    base.save_pretrained(tmp_path)
    whole = drawn(tmp_path, task)
    in_4_bits = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"}
    streamed = drawn(tmp_path, task, stir=3, **in_4_bits)
    assert whole.keys() == streamed.keys() and len(whole) > 3
    for name, value in whole.items():
        torch.testing.assert_close(streamed[name], value, rtol=0, atol=0, msg=name)
    heads = {name for name in whole if "lora_" not in name}
    assert bool(heads) == (task == "sequence_classification")


def test_another_seed_draws_other_adapters(tmp_path):
    """Else runs that are meant to differ by their seed are one run."""
    LlamaForCausalLM(small_config("llama")).save_pretrained(tmp_path)
    first, second = (drawn(tmp_path, "causal_lm", seed=seed) for seed in (7, 8))
    assert any(not torch.equal(first[name], second[name]) for name in first)
