"""Which matrices of a mixture of experts get an adapter, and what is said of the others."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from transformers.utils.output_capturing import OutputRecorder

from adalora_scale.adalora.injection import adapter_layers, coverage, inject_adalora, injection_of
from adalora_scale.adalora.targets import left_out
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import is_experts, split_all_experts, split_experts
from adalora_scale.experts.routers import routers
from tests.architectures.small import small_model
from tests.experts.models import EXPERTS, KINDS, VOCABULARY, experts_of, tiny

CONFIG = AdaLoraConfig(init_r=2, target_r=1)
LAYER = "model.layers.0.mlp.experts"


def adapted(model: nn.Module) -> list[str]:
    return [name for name, _ in adapter_layers(model)]


def loss_of(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    return model(ids, labels=ids).loss


@pytest.mark.parametrize("kind", KINDS)
def test_all_linear_means_experts_and_no_router(kind: str) -> None:
    """Else most of a mixture's weights stay as they are, or the routing is trained unasked."""
    model = inject_adalora(tiny(kind, dtype=torch.float32), CONFIG)
    layers = dict(adapter_layers(model))
    of_experts = [layer for layer in layers.values() if isinstance(layer.base_layer, ExpertLinear)]
    assert len(of_experts) == 2 * len(experts_of(model, is_experts))
    assert not any(name == router or name.startswith(router + ".") for name in layers for router in routers(model))
    assert len(routers(model)) == len(experts_of(model, is_experts))
    found = coverage(model)
    assert found.expert_matrices == sum(layer.matrices for layer in of_experts)
    assert found.matrices == found.expert_matrices + len(layers) - len(of_experts)
    assert f"({found.expert_matrices} of experts)" in str(found)
    assert re.search(rf"; {found.routers} routers? frozen$", str(found))
    loss_of(model).backward()
    assert all(bool(layer.lora_B.grad.any()) for layer in layers.values())


# Families whose routers are, or hold, plain linear layers; in the others a router is a parameter of its own class.
@pytest.mark.parametrize("kind", ["afmoe", "zaya", "phimoe", "llama4_text", "longcat_flash", "jetmoe"])
def test_routers_made_of_linear_layers_are_left_out_and_named(kind: str) -> None:
    """Else all-linear adapts the routing, which it says it does not."""
    with torch.device("meta"):
        model = small_model(kind, "causal")
    split_all_experts(model)
    inside = {
        name
        for router in routers(model)
        for name, module in model.get_submodule(router).named_modules(prefix=router)
        if isinstance(module, nn.Linear)
    }
    assert inside, kind
    assert inside <= left_out(model).keys()


def test_a_router_that_is_named_is_adapted() -> None:
    """A user may want it; by its class it must be possible."""
    model = small_model("afmoe", "causal")
    inject_adalora(model, CONFIG.replace(target_modules=["router.gate"]))
    assert adapted(model) == [f"{router}.gate" for router in routers(model)]
    assert coverage(model).routers == 0


@pytest.mark.parametrize(
    ("kind", "router"), [("mixtral", "gate"), ("phimoe", "router"), ("llama4_text", "router"), ("gpt_oss", "router")]
)
def test_a_router_that_cannot_be_adapted_is_refused_by_its_class(kind: str, router: str) -> None:
    """A bare parameter that its own forward multiplies by, or a linear layer that returns scores and choices."""
    with pytest.raises(Unsupported, match=r"cannot adapt 'model\.layers\.0\..*Router.*modules_to_save"):
        inject_adalora(tiny(kind), CONFIG.replace(target_modules=[router]))


# Every family of transformers whose routers hold linear layers that can be adapted.
@pytest.mark.parametrize("kind", ["afmoe", "zaya", "jetmoe"])
def test_what_is_recorded_of_an_adapted_router_is_with_its_adapter(kind: str) -> None:
    """Else the loss that balances experts is of a router that nobody uses, and never reaches the adapter."""
    model, ids = small_model(kind, "causal"), torch.arange(8)[None]
    inside = tuple(f"{router}." for router in routers(model))
    named = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n.startswith(inside)]
    inject_adalora(model, CONFIG.replace(target_modules=named))
    before = model(ids, output_router_logits=True).router_logits[-1]
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            for factor in (layer.lora_E, layer.lora_B):
                factor.normal_()
    after = model(ids, output_router_logits=True).router_logits[-1]
    assert not torch.allclose(before, after)
    after.sum().backward()
    assert any(layer.lora_B.grad is not None and layer.lora_B.grad.any() for _, layer in adapter_layers(model))


@pytest.mark.parametrize("spec", [nn.Linear, OutputRecorder(nn.Linear, index=0, layer_name="router.gate")])
def test_a_router_that_is_recorded_by_itself_is_refused(spec: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else its auxiliary loss is the base's: the hook sits on what the adapter was put around."""
    config, ids = CONFIG.replace(target_modules=["router.gate"]), torch.arange(8)[None]
    monkeypatch.setattr(type(small_model("afmoe", "causal").model), "_can_record_outputs", {"router_logits": spec})
    model = small_model("afmoe", "causal")
    with pytest.raises(Unsupported, match=r"layers\.1\.mlp\.router\.gate'.*as router_logits.*modules_to_save"):
        inject_adalora(model, config)
    if spec is not nn.Linear:  # of other layers it says nothing
        inject_adalora(small_model("afmoe", "causal"), CONFIG.replace(target_modules=["q_proj"]))
    monkeypatch.setattr("adalora_scale.adalora.targets.recorded", lambda *_: {})
    inject_adalora(model, config)
    before = model(ids, output_router_logits=True)
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            layer.lora_E.normal_()
            layer.lora_B.normal_()
    after = model(ids, output_router_logits=True)
    assert after.router_logits[-1].equal(before.router_logits[-1])  # what the refusal says is so
    assert not torch.allclose(after.logits, before.logits)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["gate_up_proj", "down_proj"]}, [f"{LAYER}.gate_up_proj", f"{LAYER}.down_proj"]),
        ({"target_modules": ["experts.down_proj"]}, [f"{LAYER}.down_proj"]),
        ({"target_modules": r".*experts\..*_proj", "exclude_modules": ["gate_up_proj"]}, [f"{LAYER}.down_proj"]),
        ({"target_modules": ["down_proj", "q_proj"], "exclude_modules": [LAYER]}, ["model.layers.0.self_attn.q_proj"]),
    ],
)
def test_experts_are_selected_like_layers(options: dict[str, object], expected: list[str]) -> None:
    """target_modules, exclude_modules and layers_to_transform are one rule for all layers."""
    config = CONFIG.replace(**options, layers_to_transform=[0])
    assert adapted(inject_adalora(tiny("mixtral"), config)) == expected


@pytest.mark.parametrize("asked", ["batched_mm", "deepgemm", "sonicmoe"])
def test_an_implementation_that_split_experts_cannot_follow_is_refused(asked: str) -> None:
    """Else the key that a user set has no effect any more."""
    model = tiny("mixtral")
    model.config._experts_implementation = asked  # as after loading; the kernels need a GPU
    with pytest.raises(UserError, match=rf"experts_implementation={asked}.*grouped_mm or eager.*'experts'"):
        inject_adalora(model, CONFIG)
    with pytest.raises(Unsupported, match=rf"gate_up_proj.*experts_implementation={asked}.*grouped_mm"):
        inject_adalora(model, CONFIG.replace(target_modules=["gate_up_proj"]))
    with pytest.raises(Unsupported, match=rf"MixtralExperts: experts_implementation={asked}"):
        split_experts(model.get_submodule(LAYER))
    inject_adalora(model, CONFIG.replace(exclude_modules=["experts"]))  # left alone, it is followed as ever
    assert not any(isinstance(module, ExpertLinear) for module in model.modules())


def test_expert_parallelism_and_replaced_forwards_are_refused() -> None:
    """Else every rank adapts its own experts as if they were all, or an adapter is never called."""
    for attribute, value, reason in (("_is_expert_parallel", True, "ep_size"), ("forward", print, "hook")):
        model = tiny("qwen3_moe")
        setattr(model.get_submodule(LAYER), attribute, value)
        with pytest.raises(UserError, match=rf"{LAYER}\.gate_up_proj.*{reason}"):
            inject_adalora(model, CONFIG)


def test_experts_that_a_checkpoint_quantised_are_refused() -> None:
    """transformers' FP8Experts has the interface's attributes and scales beside its weights: wrong products."""
    model = tiny("mixtral", dtype=torch.bfloat16)
    experts = model.get_submodule(LAYER)
    experts.down_proj.data = experts.down_proj.data.to(torch.float8_e4m3fn)
    with pytest.raises(UserError, match=r"experts\.gate_up_proj.*float8_e4m3fn.*16 bits"):
        inject_adalora(model, CONFIG)


def test_eager_is_the_loop_and_grouped_mm_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key stays what decides, adapters included."""
    from adalora_scale.experts import products

    model = inject_adalora(tiny("qwen3_moe", dtype=torch.float32), CONFIG)
    called: list[str] = []
    for name in ("_slices", "_rows_by_matrices"):
        own = getattr(products, name)
        monkeypatch.setattr(products, name, lambda *a, own=own, name=name: called.append(name) or own(*a))
    for asked, wanted in (("eager", "_slices"), ("grouped_mm", "_rows_by_matrices")):
        called.clear()
        model.config._experts_implementation = asked
        loss_of(model).backward()
        assert set(called) == {wanted}


@pytest.mark.parametrize("saved", ["experts", "gate", "experts.down_proj"])
def test_experts_and_routers_can_be_trained_in_full(saved: str) -> None:
    """modules_to_save names modules, and these are some; float32 whatever the base."""
    model = tiny("qwen3_moe", dtype=torch.bfloat16).train()
    inject_adalora(model, CONFIG.replace(modules_to_save=[saved]))
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}
    assert len(trained) == 2 * (2 if saved == "experts" else 1)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert not any(name.endswith(saved) or f"{saved}." in name for name in adapted(model))
    loss_of(model).backward()
    assert all(bool(p.grad is not None and p.grad.any()) for p in trained.values())
    assert coverage(model).routers == (0 if saved == "gate" else 2)


def test_number_of_experts_is_what_the_names_count() -> None:
    """A layer of E experts has E matrices, each of the sides of one expert."""
    model = inject_adalora(tiny("gpt_oss"), CONFIG.replace(target_modules=["experts.down_proj"]))
    (layer, *_) = [layer for _, layer in adapter_layers(model)]
    assert (layer.matrices, layer.in_features, layer.out_features) == (EXPERTS, 24, 16)
    assert layer.triplet_size == 24 + 16 + 1
    assert injection_of(model) is not None
