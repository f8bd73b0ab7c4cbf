"""Adapters on experts in the forms of others: PEFT's own LoRA, and the base's checkpoint with the update in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from adalora_scale import save_adapter
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.exporting import export_adapter
from adalora_scale.export.request import Request
from tests.experts.models import tiny
from tests.experts.test_saving import logits, trained

# Per-expert checkpoints of gated and ungated experts; fused ones, as they are, transposed, renamed.
KINDS = ["mixtral", "nemotron_h", "gpt_oss", "llama4_text", "granitemoe"]


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[nn.Module, Path]:
    """The live model, and a folder with its base and its adapter."""
    kind = request.param
    tiny(kind, dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = trained(kind)
    save_adapter(model, tmp_path / "adapter", named=False)
    return model, tmp_path


def export(folder: Path, form: str, **options: Any) -> Path:
    report = export_adapter(
        Request(
            adapter=folder / "adapter", output=folder / form, base=str(folder / "base"), format=form, fidelity=False,
            **options,
        )
    )  # fmt: skip
    (folder / f"{form}.json").write_text(json.dumps(report, default=str))
    return folder / form


def opened(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


@pytest.mark.parametrize("run", KINDS, indirect=True)
def test_merged_it_has_the_bases_names_and_the_adapters_logits(run: tuple[nn.Module, Path]) -> None:
    """Fused or one tensor an expert, as the base has it; else transformers cannot load it, or experts are exchanged."""
    model, folder = run
    merged = export(folder, "merged")
    names, others = (
        {key for file in (where).glob("*.safetensors") for key in safe_open(file, "pt").keys()}  # noqa: SIM118
        for where in (merged, folder / "base")
    )
    assert names == others
    before = logits(opened(folder / "base"))
    after, expected = logits(opened(merged)), logits(model)
    assert (before - expected).norm() > 0.01 * expected.norm()
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("run", KINDS, indirect=True)
def test_peft_opens_what_was_trained(run: tuple[nn.Module, Path]) -> None:
    """PEFT has its own order of experts and ranks in a stack, and its own nesting of wrappers."""
    model, folder = run
    lora = export(folder, "peft-lora")
    there = PeftModel.from_pretrained(opened(folder / "base"), lora)
    expected = logits(model)
    torch.testing.assert_close(logits(there), expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    config = json.loads((lora / "adapter_config.json").read_text())
    assert all("experts." in name for name in config["target_parameters"])
    assert "one rank for all experts" in (folder / "peft-lora.json").read_text()


@pytest.mark.parametrize("run", ["mixtral"], indirect=True)
def test_what_peft_cannot_hold_is_refused(run: tuple[nn.Module, Path]) -> None:
    """By the name of a tensor of experts, with the form that can."""
    _, folder = run
    with pytest.raises(Unsupported, match=r"experts\.gate_up_proj.*peft-lora"):
        export(folder, "peft-adalora")
    with pytest.raises(Unsupported, match=r"one rank for all experts of '.*experts\.gate_up_proj'.*peft-lora"):
        export(folder, "rank-pattern")


@pytest.mark.parametrize("run", ["mixtral", "gpt_oss"], indirect=True)
def test_another_base_is_refused(run: tuple[nn.Module, Path]) -> None:
    """By its experts' weights, which a checkpoint may hold in pieces; else they are merged into strangers."""
    model, folder = run
    kind = model.config.model_type
    stranger = tiny(kind, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in stranger.named_parameters():
            if name.endswith("layers.1.mlp.experts.gate_up_proj"):
                parameter[0, 0, 0] += 1
    stranger.save_pretrained(folder / "base")
    with pytest.raises(UserError, match="another base"):
        export(folder, "merged")


def test_experts_trained_in_full_are_merged_in_pieces(tmp_path: Path) -> None:
    """The checkpoint has a tensor for each, gate and up apart."""
    tiny("mixtral", dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = trained("mixtral", modules_to_save=["experts"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "lora" not in name:
                parameter += 0.1 * torch.randn_like(parameter)
    save_adapter(model, tmp_path / "adapter", named=False)
    expected = logits(model)
    after = logits(opened(export(tmp_path, "merged")))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_a_projection_trained_in_full_is_no_module_to_peft(tmp_path: Path) -> None:
    """PEFT would look for a module of that name, find none, and leave the weights out; merged they arrive."""
    tiny("gpt_oss", dtype=torch.float32).save_pretrained(tmp_path / "base")
    model = trained("gpt_oss", modules_to_save=["experts.down_proj"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "down_proj" in name and "lora" not in name:
            parameter.data *= 1.5
    save_adapter(model, tmp_path / "adapter", named=False)
    with pytest.raises(Unsupported, match=r"'experts\.down_proj'.*a parameter to PEFT.*merged"):
        export(tmp_path, "peft-lora")
    expected = logits(model)
    after = logits(opened(export(tmp_path, "merged")))
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def served(base: Path, lora: Path, out: Path) -> nn.Module:
    """Read a LoRA as vLLM does, one rank and alpha for all, and add it to the checkpoint's own tensors.

    Written after vllm/lora/model_manager.py: `_stack_moe_lora_weights` for models whose experts are one tensor (in the
    file `experts.base_layer` is gate_up_proj and `experts` down_proj); else every tensor of the checkpoint is a module.
    Its models map the checkpoint's prefix to their own (Nemotron-H: backbone to model), so both names do.
    """
    config = json.loads((lora / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    factors, weights = load_file(lora / "adapter_model.safetensors"), load_file(base / "model.safetensors")
    for key in [key for key in factors if key.endswith(".lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = factors[key], factors[key.replace("lora_A", "lora_B")]
        if module.endswith(("experts", "experts.base_layer")):
            leaf = "gate_up_proj" if module.endswith("base_layer") else "down_proj"
            name = f"{module.removesuffix('.base_layer')}.{leaf}"
            experts = weights[name].shape[0]
            assert a.shape[0] == b.shape[1] == experts * config["r"]
            of_a = a.reshape(experts, -1, a.shape[-1])
            of_b = b.reshape(b.shape[0], -1, experts).permute(2, 0, 1)
            weights[name] += scaling * (of_b @ of_a).mT  # GPT-OSS has (experts, in, out)
        else:
            assert a.shape[0] == b.shape[1] == config["r"]
            name = f"{module}.weight"
            weights[name if name in weights else name.replace("model.", "backbone.", 1)] += scaling * b @ a
    shutil.copytree(base, out)
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return opened(out)


@pytest.mark.parametrize("run", ["mixtral", "nemotron_h", "gpt_oss"], indirect=True)
def test_servers_read_a_lora_an_expert(run: tuple[nn.Module, Path]) -> None:
    """Under the checkpoint's own names, w1 and w3 or gate and up apart; else vLLM drops the experts' update."""
    model, folder = run
    lora = export(folder, "peft-lora", uniform=True)
    expected = logits(model)
    there = logits(served(folder / "base", lora, folder / "served"))
    torch.testing.assert_close(there, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    if "gpt" not in type(model).__name__.lower():
        assert "LoRA each, as vLLM reads it" in (folder / "peft-lora.json").read_text()
