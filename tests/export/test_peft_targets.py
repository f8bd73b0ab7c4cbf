"""PEFT must adapt the matrices that an exported LoRA names: it rewrites targets of models with fused experts."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from adalora_scale.adalora.compaction import compact
from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import AdaLoraConfig
from adalora_scale.export import peft_targets
from adalora_scale.export.peft_adalora import save_adapter
from tests.architectures.small import small_model
from tests.export.adapters import export, logits, one_error_line

MIXTURES = {
    "glm4_moe": {"gate_proj", "up_proj", "down_proj"},
    "minimax": {"gate"},  # PEFT takes its names for Mixtral's
    "qwen2_moe": set(),
}
"""Architecture → the leaves that PEFT would take for an expert's."""


def adapted(folder, model_type: str, **options):
    """A model in a folder and an adapter with an update on everything but experts; returns the live model."""
    model = small_model(model_type, "causal")
    model.save_pretrained(folder / "base")
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    targets = [name for name in names if name != "lm_head" and ".experts" not in name]
    values = {"init_r": 4, "target_r": 2, "target_modules": targets} | options
    inject_adalora(model, AdaLoraConfig(**values))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            for factor in (layer.lora_A, layer.lora_B, layer.lora_E):
                factor.copy_(0.3 * torch.randn(factor.shape, generator=generator))
    layers = enumerate(adapter_layers(model))
    compact(model, {name: [place <= index % 3 for place in range(4)] for index, (name, _) in layers})
    save_adapter(model, folder / "run")
    return model.eval()


@pytest.mark.parametrize("model_type", MIXTURES)
def test_a_lora_of_a_mixture_of_experts_opens_in_peft_as_what_was_trained(tmp_path, capsys, model_type):
    """Else the dense layer's and shared experts' updates are lost with a warning, and experts get empty ones."""
    live = adapted(tmp_path, model_type)
    base = small_model(model_type, "causal")
    plain = logits(base)
    common = ("--base", tmp_path / "base", "--no-fidelity")
    report = export(tmp_path / "run", tmp_path / "lora", "--format", "peft-lora", *common, capsys=capsys)
    assert {name.split(".")[-1] for name in report["as_parameters"]} == MIXTURES[model_type] & {
        name.split(".")[-1] for name in report["ranks"]
    }
    assert any("target_parameters" in note for note in report["notes"]) == bool(report["as_parameters"])
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "lora")
    expected = logits(live)
    assert (expected - plain).norm() > 0.05 * plain.norm()
    assert (logits(opened) - expected).norm() < 1e-5 * (expected - plain).norm()
    # What was written is read here too, at the same ranks, and gives the same model.
    export(tmp_path / "lora", tmp_path / "merged", "--format", "merged", *common)
    export(tmp_path / "run", tmp_path / "merged-at-once", "--format", "merged", *common)
    merged, at_once = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "merged-at-once"))
    for name, tensor in at_once.items():
        torch.testing.assert_close(merged[name], tensor, msg=name)


def test_the_patterns_of_weights_are_peft_s_ranks(tmp_path, capsys):
    """Else a run from the rank pattern trains other ranks, or experts."""
    adapted(tmp_path, "glm4_moe", lora_dropout=0.1)
    report = export(
        tmp_path / "run", tmp_path / "out", "--format", "rank-pattern", "--base", tmp_path / "base", capsys=capsys
    )
    assert any("without lora_dropout" in note for note in report["notes"])
    model = peft.get_peft_model(small_model("glm4_moe", "causal"), peft.LoraConfig.from_pretrained(tmp_path / "out"))
    layers = dict(model.get_base_model().named_modules())
    got = {name: layer.r["default"] for name, layer in layers.items() if hasattr(layer, "lora_A")}
    assert got == report["ranks"] and set(got.values()) == {1, 2, 3}


def test_the_config_is_refused_where_peft_adapts_something_else():
    """A config that PEFT reads otherwise must not be written: nobody compares logits where memory is short."""
    model = small_model("glm4_moe", "causal").to("meta")
    name = "model.layers.0.mlp.up_proj"
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": [name], "rank_pattern": {}, "alpha_pattern": {},
    }  # fmt: skip
    settled = peft_targets.placed_config(config, {name: (4, 1.0)}, model)
    assert settled["target_parameters"] == [f"{name}.weight"] and settled["target_modules"] == []
    for wanted in ({name: (3, 1.0)}, {name: (4, 2.0)}, {"model.layers.0.no_proj": (4, 1.0)}):
        with pytest.raises(peft_targets.Unsupported, match="--format merged"):
            peft_targets.placed_config(config, wanted, model)


def test_a_layer_that_peft_takes_for_a_head_is_refused_by_name(tmp_path, capsys):
    """Else PEFT ends in a KeyError where the adapter is opened."""
    torch.manual_seed(0)
    shape = DistilBertConfig(vocab_size=64, dim=32, hidden_dim=64, n_layers=1, n_heads=2, num_labels=3)
    model = DistilBertForSequenceClassification(shape)
    model.save_pretrained(tmp_path / "base")
    inject_adalora(model, AdaLoraConfig(init_r=2, target_r=1, target_modules=["lin1"], modules_to_save=["classifier"]))
    save_adapter(model, tmp_path / "run")
    command = ["export", str(tmp_path / "run"), str(tmp_path / "out"), "--base", str(tmp_path / "base"), "--format"]
    assert "'pre_classifier'" in one_error_line(capsys, lambda: main([*command, "peft-lora", "--no-fidelity"]))
    assert not (tmp_path / "out").exists()
    assert main([*command, "merged"]) == 0
