"""Adapters on experts compute what dense adapters on every single expert's matrix do.

The other side shares no code with `experts/`: transformers' own loop over experts, its weights W_e + s · B_e diag(E_e)
A_eᵀ made one expert after another and differentiated through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalora_scale.adalora.adaptables import FACTORS
from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.config import AdaLoraConfig
from adalora_scale.experts.groups import by_expert
from adalora_scale.experts.linear import ExpertLinear
from tests.experts.models import KINDS, VOCABULARY, tiny

CONFIG = AdaLoraConfig(init_r=3, target_r=2)
SEED = 4
FEW = (1, 2)
"""So few tokens that some experts get none, of every kind under this seed."""
Factors = dict[str, tuple[Tensor, Tensor, Tensor]]


def adapted(kind: str, dtype: torch.dtype, **options: object) -> nn.Module:
    """A tiny model with an update on every matrix, computing through the kernel where it runs."""
    model = inject_adalora(tiny(kind, dtype=dtype), CONFIG.replace(**options))
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.config._experts_implementation = "grouped_mm"
    torch.manual_seed(7)
    for _, layer in adapter_layers(model):
        for factor in FACTORS:
            value = torch.randn_like(getattr(layer, factor)) * 0.3
            setattr(layer, factor, nn.Parameter(value.to(dtype)))
    return model


def tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(SEED))


def factors_of(model: nn.Module) -> Factors:
    return {name: (layer.lora_A, layer.lora_E, layer.lora_B) for name, layer in adapter_layers(model)}


def dense(plain: nn.Module, adapted: nn.Module, factors: Factors) -> dict[str, Tensor]:
    """Parameters of the plain model with the updates in them, expert by expert."""
    own, weights = dict(plain.named_parameters()), {}
    for name, layer in adapter_layers(adapted):
        a, e, b = factors[name]
        if layer.matrices == 1:
            weights[f"{name}.weight"] = own[f"{name}.weight"] + layer.scaling * b @ torch.diag(e) @ a.T
            continue
        single = []
        for number in range(layer.matrices):
            a_e = a[number * layer.in_features : (number + 1) * layer.in_features]
            b_e = b[number * layer.out_features : (number + 1) * layer.out_features]
            single.append(layer.scaling * b_e @ torch.diag(e[number]) @ a_e.T)
        delta = torch.stack(single)
        lies_input_first = own[name].shape[1:] != delta.shape[1:] or "gpt" in type(plain).__name__.lower()
        weights[name] = own[name] + (delta.transpose(1, 2) if lies_input_first else delta)
    return weights


@pytest.mark.parametrize("shape", [(2, 7), FEW], ids=["many tokens", "experts without a token"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["double", "single"])
@pytest.mark.parametrize("kind", KINDS)
def test_experts_with_adapters_are_a_loop_over_dense_ones(
    kind: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """The forward and the gradient of every factor of every expert; else a mixture is trained wrongly."""
    tolerance = 1e-10 if dtype == torch.float64 and kind != "nemotron_h" else 1e-5  # its router works in float32
    model, plain, ids = adapted(kind, dtype), tiny(kind, dtype=dtype), tokens(*shape)
    mine = factors_of(model)
    theirs = {name: tuple(f.detach().clone().requires_grad_() for f in three) for name, three in mine.items()}
    expected = torch.func.functional_call(plain, dense(plain, model, theirs), (ids,)).logits
    actual = model(ids).logits
    assert distance([actual], [expected]) <= tolerance
    slope = torch.randn(actual.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    (expected * slope).sum().backward()
    (actual * slope).sum().backward()
    own = [factor.grad for three in mine.values() for factor in three]
    other = [factor.grad for three in theirs.values() for factor in three]
    assert distance(own, other) <= tolerance
    assert max(distance([a], [b]) for a, b in zip(own, other, strict=True)) <= 5 * tolerance
    idle = sum(int((e.grad == 0).all(dim=1).sum()) for _, e, _ in mine.values() if e.dim() == 2)
    assert shape != FEW or idle > 0


def distance(actual: Iterable[Tensor | None], expected: Iterable[Tensor | None]) -> float:
    """How far two lists of tensors are from each other, in norm over all of them, of the second's norm."""
    squares = [
        ((a.detach() - b.detach()).square().sum(), b.detach().square().sum())
        for a, b in zip(actual, expected, strict=True)
    ]
    apart, whole = (float(sum(column)) for column in zip(*squares, strict=True))
    return (apart / whole) ** 0.5 if whole else apart


@pytest.mark.parametrize("transposed", [False, True])
def test_dropout_falls_on_the_input_of_each_experts_adapter(transposed: bool) -> None:
    """Else it is on another tensor than in LoRA, or scales the base's output too."""
    torch.manual_seed(0)
    weight = torch.randn(4, 6, 10)
    base = ExpertLinear(nn.Parameter(weight.mT.contiguous() if transposed else weight), transposed=transposed)
    layer = AdaLoraLayer(base, r=2, scaling=0.5, dropout=0.4)
    for factor in FACTORS:
        nn.init.normal_(getattr(layer, factor))
    groups, order = by_expert(torch.tensor([[0, 3], [3, 1], [0, 1]]), 4)
    x = torch.randn(3, 10).index_select(0, order // 2)
    torch.manual_seed(5)
    actual = layer(x, groups)
    torch.manual_seed(5)
    dropped = F.dropout(x, 0.4)
    rows = []
    for row, expert in enumerate(groups.expert_of_row.tolist()):
        a, b = layer.lora_A[10 * expert : 10 * expert + 10], layer.lora_B[6 * expert : 6 * expert + 6]
        rows.append(weight[expert] @ x[row] + 0.5 * (b * layer.lora_E[expert]) @ (a.T @ dropped[row]))
    torch.testing.assert_close(actual, torch.stack(rows), rtol=1e-5, atol=1e-5)
    layer.eval()
    assert not torch.equal(layer(x, groups), actual)
    torch.testing.assert_close(layer(x, groups), layer(x, groups), rtol=0, atol=0)


def gradients(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "llama4_text"])
@pytest.mark.parametrize("way", ["checkpointing", "reentrant checkpointing", "autocast", "compiled"])
def test_gradients_stay_what_they_are(kind: str, way: str) -> None:
    """Under what trainers put around a model; with nn.Linear under them it is so too."""
    model, ids = adapted(kind, torch.float32).train(), tokens(2, 7)
    expected, tolerance, around = gradients(model, ids), 1e-5, contextlib.nullcontext()
    if "checkpointing" in way:
        model.gradient_checkpointing_enable({"use_reentrant": "reentrant" in way})
        model.enable_input_require_grads()
    elif way == "autocast":
        tolerance, around = 0.1, torch.autocast("cpu", torch.bfloat16)
    else:
        # One graph of every experts module, as the trainer's torch_compile would make it, without the C++ compiler.
        for name, module in model.named_modules():
            if name.endswith("experts"):
                module.forward = torch.compile(module.forward, backend="aot_eager", fullgraph=True)
    with around:
        actual = gradients(model, ids)
    assert distance([actual[name] for name in expected], expected.values()) <= tolerance
