"""What adapters on experts cost: operations that do not grow with experts, and memory for two of them at most."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.cluster.plan.trace import LiveBytes
from adalora_scale.config import AdaLoraConfig
from adalora_scale.experts import products
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import is_experts
from tests.experts.models import VOCABULARY, experts_of, tiny

_INSIDE = {
    torch.ops.adalora_scale.grouped_product.default: products._product._init_fn,
    torch.ops.adalora_scale.grouped_outer.default: products._outer._init_fn,
}
"""Our own operators → what they do: a mode would see them as one operation."""


class Inside:
    """Makes a mode see what our own operators do inside."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _INSIDE:
            with self:
                return _INSIDE[function](*args, **(kwargs or {}))
        return super().__torch_dispatch__(function, types, args, kwargs)


class Counter(TorchDispatchMode):
    operations = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations += 1
        return function(*args, **(kwargs or {}))


class Operations(Inside, Counter):
    """All operations, views among them."""


class Memory(Inside, LiveBytes):
    """Bytes of storages alive."""


def model_of(kind: str, *, experts: int, adapted: bool = True, **sizes: int) -> nn.Module:
    key = "num_local_experts" if kind in ("gpt_oss", "llama4_text", "mixtral") else "num_experts"
    model = tiny(kind, dtype=torch.float32, **{key: experts}, **sizes).requires_grad_(False)
    if kind != "llama4_text":
        model.config._experts_implementation = "grouped_mm"
    if adapted:
        inject_adalora(model, AdaLoraConfig(init_r=4, target_r=2, target_modules=["gate_up_proj", "down_proj"]))
    return model


def step(model: nn.Module, mode: TorchDispatchMode, ids: Tensor) -> None:
    """A forward and a backward; gradients of what comes in too, as every layer but the first has it."""
    embeddings = model.get_input_embeddings()(ids).requires_grad_()
    with mode:
        model(inputs_embeds=embeddings).logits.sum().backward()


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
def test_operations_do_not_grow_with_experts(kind: str) -> None:
    """Else 128 experts are 16 times the launches of 8; views count too."""
    ids = torch.randint(3, VOCABULARY, (2, 16))
    counts = []
    for experts in (8, 128):
        step(model_of(kind, experts=experts), mode := Operations(), ids)
        counts.append(mode.operations)
    assert abs(counts[1] - counts[0]) <= 0.05 * counts[0], counts


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_the_backward_keeps_the_parameter_and_no_view_of_it(kind: str) -> None:
    """Under ZeRO-3 a view would hold each layer's gathered weights until the backward: all of the model on a rank."""
    model = model_of(kind, experts=8)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        model(inputs_embeds=torch.randn(1, 4, 16, requires_grad=True))
    for layer in (module for module in model.modules() if isinstance(module, ExpertLinear)):
        same = [t for t in kept if t.untyped_storage().data_ptr() == layer.weight.untyped_storage().data_ptr()]
        assert same
        assert all(t is layer.weight for t in same)


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_step_needs_the_bases_memory_the_adapters_and_two_experts(kind: str) -> None:
    """Else ΔW, or a copy of all experts' weights, is made in every forward."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    sizes |= {"moe_intermediate_size": 96} if kind == "qwen3_moe" else {}
    ids = torch.randint(3, VOCABULARY, (1, 16), generator=torch.Generator().manual_seed(1))
    peaks = {}
    for adapted in (False, True):
        model = model_of(kind, experts=32, adapted=adapted, **sizes)
        gc.collect()
        mode = Memory([*model.parameters(), *model.buffers()])
        step(model, mode, ids)
        peaks[adapted] = mode.peak
    (experts,) = experts_of(model, is_experts).values()
    layers = [layer for _, layer in adapter_layers(model)]
    adapters = sum(factor.nbytes for layer in layers for factor in (layer.lora_A, layer.lora_E, layer.lora_B))
    weights = [inner.weight for inner in experts.modules() if isinstance(inner, ExpertLinear)]
    one = sum(weight[0].nbytes for weight in weights)
    assert peaks[True] <= peaks[False] + adapters + 2 * one, (peaks, adapters, one)
