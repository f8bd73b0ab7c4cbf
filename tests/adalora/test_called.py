"""Layers that are linear by their class and are not called as such, and tensors that are no experts."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from adalora_scale.adalora.injection import adapter_layers, inject_adalora, injection_of
from adalora_scale.adalora.targets import expert_tensors, left_out
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported
from adalora_scale.quantization.called import computes_linear, weights_read
from adalora_scale.quantization.linear import quantization_targets

SIZES = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 32, "pad_token_id": 0}
CONFIG = AdaLoraConfig(init_r=2, target_r=1)


class Router(nn.Linear):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x).topk(1)


class SameByHand(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.T + (0 if self.bias is None else self.bias)


class Reads(nn.Module):
    """Everything a module may do with a layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.read, self.aliased = (nn.Linear(4, 4) for _ in range(3))
        self.listed, self.asked, self.sliced = nn.ModuleList([nn.Linear(4, 4)]), nn.Linear(4, 4), nn.Linear(4, 4)
        self.router, self.by_hand = Router(4, 4), SameByHand(4, 4, bias=False)
        with torch.no_grad():
            self.called.weight.mul_(self.asked.weight.norm())  # not in forward

    def forward(self, x: Tensor) -> Tensor:
        return self._inner(self.called(x).to(self.asked.weight.dtype))

    def _inner(self, x: Tensor) -> Tensor:
        layer = self.aliased
        if x.shape[0] > 100:
            x = x @ self.sliced.weight[:4]
        x = self.sliced(self.asked(x)) @ layer.weight
        return self.by_hand(nn.functional.linear(x, self.read.weight) @ self.listed[0].weight) + self.router(x)[0]


def mamba() -> nn.Module:
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, state_size=4))


def llama4() -> nn.Module:
    return hf.Llama4ForCausalLM(
        hf.Llama4TextConfig(
            **SIZES, **HEADS, head_dim=8, intermediate_size_mlp=32, num_local_experts=2, moe_layers=[0],
            no_rope_layers=[1], layer_types=["full_attention"],
        )
    )  # fmt: skip


def test_what_a_forward_does_with_a_layer_is_read_off_its_source():
    """Else adapters are put where nothing calls them: they never get a gradient."""
    model = Reads()
    assert {name for name in weights_read(model)} == {"read", "aliased", "listed.0"}
    assert set(left_out(model)) == {"read", "aliased", "listed.0", "router"}
    inject_adalora(model, CONFIG)
    adapted = dict(adapter_layers(model))
    assert set(adapted) == {"called", "asked", "sliced", "by_hand"}
    model(torch.randn(2, 4)).sum().backward()
    assert all(bool(layer.lora_B.grad.any()) for layer in adapted.values())


@pytest.mark.parametrize("name", ["read", "aliased", "listed.0", "router"])
def test_named_all_the_same_they_are_refused(name):
    """Else an adapter that a user asked for by name is silently without effect, or a traceback."""
    with pytest.raises(Unsupported, match=rf"cannot adapt .*({name}|Router).*adalora\.exclude_modules"):
        inject_adalora(Reads(), CONFIG.replace(target_modules=[name]))


def test_a_linear_layer_written_by_hand_is_linear():
    """Else Falcon, whose layers multiply by themselves, is left without adapters."""
    from transformers.models.falcon.modeling_falcon import FalconLinear

    assert all(computes_linear(kind(4, 5, bias=b)) for kind in (FalconLinear, nn.Linear) for b in (True, False))
    assert computes_linear(FalconLinear(4, 5, device="meta")) and computes_linear(hf.pytorch_utils.Conv1D(4, 5))
    assert not computes_linear(Router(4, 5)) and not computes_linear(nn.Embedding(4, 5))


@pytest.mark.parametrize("make", [mamba, llama4])
def test_every_adapter_of_all_linear_gets_a_gradient(make):
    """Mamba's mixer and Llama 4's router; else adapters that do nothing, or a traceback in the first forward."""
    torch.manual_seed(0)
    model = make()
    inject_adalora(model, CONFIG)
    said = injection_of(model).left_out
    names = {name.split(".")[-1] for name in said}
    assert names == ({"x_proj", "dt_proj", "out_proj"} if make is mamba else {"router"}), said
    tokens = torch.arange(1, 9).view(2, 4)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert all(bool(layer.lora_B.grad.any()) for _, layer in adapter_layers(model))


def test_they_stay_out_of_4_bits():
    """Else the mixer multiplies by packed bytes, and a router in 4 bits is no router."""
    assert [name.split(".")[-1] for name in quantization_targets(mamba())] == ["in_proj"]
    assert not any("router" in name for name in quantization_targets(llama4()))


def test_class_tokens_and_tables_of_positions_are_no_experts():
    """Else all-linear refuses ViT and CLIP for their class token; experts it must go on refusing."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"image_size": 8, "patch_size": 4}
    vit = hf.ViTForImageClassification(hf.ViTConfig(**shape, **image))
    clip = hf.CLIPVisionModel(hf.CLIPVisionConfig(**shape, **image))
    for model in (
        vit,
        clip,
        hf.DeiTModel(hf.DeiTConfig(**shape, **image)),
        hf.BeitModel(hf.BeitConfig(**shape, **image)),
    ):
        assert list(expert_tensors(model)) == []
        assert inject_adalora(model, CONFIG) is model
    bare = nn.Module()
    bare.w, bare.tokens, bare.query_tokens = (nn.Parameter(torch.zeros(n, 4, 4)) for n in (3, 3, 1))
    bare.cls_token = nn.Parameter(torch.zeros(1, 1, 4))
    assert [leaf for _, leaf, _ in expert_tensors(bare)] == ["w"]
    assert [leaf for _, leaf, _ in expert_tensors(llama4())] == ["gate_up_proj", "down_proj"]
