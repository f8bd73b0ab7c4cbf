"""Adapters on experts into files and back, and into the weights and out again, in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from adalora_scale import load_adapter, merge_adapters, merge_and_unload, save_adapter, unload, unmerge_adapters
from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import UserError
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.export.continual import start_from_adapter
from adalora_scale.export.peft_adalora import saved_values
from tests.experts.models import VOCABULARY, tiny

R = 4
CONFIG = AdaLoraConfig(init_r=R, target_r=2)
KINDS = ["mixtral", "gpt_oss", "deepseek_v3", "llama4_text", "nemotron_h"]


def trained(kind: str, *, settled: bool = True, **options: Any) -> nn.Module:
    """As after the final allocation: every matrix has ranks of its own, some none."""
    model = inject_adalora(tiny(kind, dtype=torch.float32), CONFIG.replace(**options))
    generator = torch.Generator().manual_seed(3)
    for number, (_, layer) in enumerate(adapter_layers(model)):
        for factor in ("lora_A", "lora_E", "lora_B"):
            value = getattr(layer, factor)
            value.data = torch.randn(value.shape, generator=generator) * 0.3
        if settled:
            mask = torch.rand(layer.matrices, R, generator=generator) < 0.5
            mask[0] = number % 2  # a matrix with all triplets, or with none
            if number % 3 == 0:
                mask[:, 1:3] = False  # a layer that can be built smaller
                mask[0] = False
            layer.keep_mask = mask.flatten().tolist()
            layer.lora_E.data *= mask.view_as(layer.lora_E)
    return model


def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(ids).logits


def held(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def compacted(layer: AdaLoraLayer) -> None:
    """Build the layer at its pruned ranks, each matrix's triplets in the first columns."""
    from adalora_scale.adalora.matrices import kept_columns, parts, stacked

    columns = kept_columns(layer.matrices, layer.r, layer.keep_mask)
    each = parts(layer.lora_A.data, layer.lora_E.data, layer.lora_B.data, layer.matrices)
    kept = [tuple(factor[..., c] for factor in three) for c, three in zip(columns, each, strict=True)]
    r = max(c.numel() for c in columns)
    if r == layer.r:  # nothing becomes smaller: triplets stay where they are
        return
    for factor, value in zip(("lora_A", "lora_E", "lora_B"), stacked(kept, r), strict=True):
        setattr(layer, factor, nn.Parameter(value))
    layer.r = r


@pytest.mark.parametrize("settled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_adapter_loads_as_what_it_was(tmp_path: Path, kind: str, settled: bool) -> None:
    """Each expert's matrix has its own entry with its own rank; else ranks are lost, or experts are exchanged."""
    model = trained(kind, settled=settled)
    save_adapter(model, tmp_path / "first", named=False)
    with safe_open(tmp_path / "first/adapter_model.safetensors", "pt") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    for name, layer in adapter_layers(model):
        if layer.matrices > 1:
            before, _, last = name.rpartition(".")
            mask = torch.tensor(layer.keep_mask or [True] * R * layer.matrices).view(layer.matrices, R)
            for number in range(layer.matrices):
                rank = int(mask[number].sum())
                key = f"base_model.model.{before}.{number}.{last}"
                assert shapes[f"{key}.lora_A"] == (rank, layer.in_features)
                assert shapes[f"{key}.lora_E"] == (rank, 1)
                assert shapes[f"{key}.lora_B"] == (layer.out_features, rank)
    loaded = load_adapter(tiny(kind, dtype=torch.float32), tmp_path / "first")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    save_adapter(loaded, tmp_path / "second", named=False)
    assert held(tmp_path / "second").keys() == held(tmp_path / "first").keys()
    assert all(torch.equal(held(tmp_path / "second")[key], value) for key, value in held(tmp_path / "first").items())
    for layer in dict(adapter_layers(model)).values():
        if settled:
            compacted(layer)
    save_adapter(model, tmp_path / "third", named=False)
    assert all(torch.equal(held(tmp_path / "third")[key], value) for key, value in held(tmp_path / "first").items())


def test_a_live_model_gets_back_what_was_saved(tmp_path: Path) -> None:
    """Else load_best_model_at_end gives experts each other's values."""
    model = trained("gpt_oss")
    save_adapter(model, tmp_path, named=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    expected = logits(model)
    for _, layer in adapter_layers(model):
        layer.lora_B.data.zero_()
    for parameter, value in saved_values(model, tmp_path):
        parameter.data.copy_(value)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)  # pruned are zero


def test_modules_trained_in_full_have_transformers_own_names(tmp_path: Path) -> None:
    """`….experts.gate_up_proj`, as the base's parameters are called; else only this package finds them."""
    model = trained("gpt_oss", modules_to_save=["experts"])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "experts" in name:
            parameter.data += 0.1
    save_adapter(model, tmp_path, named=False)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        saved = {key.removeprefix("base_model.model.") for key in file.keys() if "experts" in key}  # noqa: SIM118
    own = {name for name, _ in tiny("gpt_oss").named_parameters() if "experts" in name}
    assert saved == own
    loaded = load_adapter(tiny("gpt_oss", dtype=torch.float32), tmp_path)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)


def test_another_base_is_refused(tmp_path: Path) -> None:
    """The digest covers experts' weights."""
    save_adapter(trained("mixtral"), tmp_path, named=False)
    with pytest.raises(UserError, match="another base model"):
        load_adapter(tiny("mixtral", dtype=torch.float32, seed=1), tmp_path)
    fewer = tiny("mixtral", dtype=torch.float32, num_local_experts=4)
    with pytest.raises(UserError, match=r"experts\.4\.gate_up_proj"):
        load_adapter(fewer, tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_in_memory_and_taken_out_again(kind: str) -> None:
    """The merged model gives the adapter's logits, and comes back bit for bit; transformers' classes and names."""
    model, plain = trained(kind), tiny(kind, dtype=torch.float32)
    expected = logits(model)
    merge_adapters(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    unmerge_adapters(model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=0)
    merged = merge_and_unload(model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in merged.modules()] == [type(module) for module in plain.modules()]
    again = unload(trained(kind))
    for name, value in plain.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert not any(isinstance(module, ExpertLinear) for module in again.modules())


def test_a_new_run_starts_from_an_earlier_adapter(tmp_path: Path) -> None:
    """Its function is there at step 0, expert by expert."""
    model = trained("mixtral")
    save_adapter(model, tmp_path, named=False)
    started = inject_adalora(tiny("mixtral", dtype=torch.float32), CONFIG.replace(init_r=6))
    start_from_adapter(started, tmp_path)
    torch.testing.assert_close(logits(started), logits(model), rtol=1e-4, atol=1e-4)
    assert all(layer.r == 6 for _, layer in adapter_layers(started))
