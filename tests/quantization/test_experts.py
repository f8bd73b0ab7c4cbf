"""Experts in 4 bits: bitsandbytes' bytes for each expert alone, and the product of all of them at once."""

import weakref

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.functional import QuantState

from adalora_scale.adalora.injection import coverage, inject_adalora
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import UserError
from adalora_scale.experts.groups import by_expert
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import split_all_experts
from adalora_scale.experts.routers import routers
from adalora_scale.placing import streaming
from adalora_scale.quantization import expert_operators, functional
from adalora_scale.quantization.experts import ExpertLinear4bit, empty_4bit, in_16bit
from adalora_scale.quantization.linear import (
    dequantize_model,
    quantization_targets,
    quantize_model,
    quantized_share,
)
from adalora_scale.quantization.spec import QuantSpec
from tests.architectures.small import small_model
from tests.experts.models import KINDS, VOCABULARY, tiny

EXPERTS, IN, OUT = 5, 48, 640  # 480 blocks an expert: two of the second level
FP32 = QuantSpec(compute_dtype=torch.float32)


def layers(spec, *, transposed=False, bias=True):
    """A random `ExpertLinear`, experts of different sizes of weights, and the same in 4 bits."""
    torch.manual_seed(0)
    weight = torch.randn(EXPERTS, OUT, IN) * torch.arange(1, EXPERTS + 1).view(-1, 1, 1)
    stored = weight.mT.contiguous() if transposed else weight
    biases = torch.nn.Parameter(torch.randn(EXPERTS, OUT)) if bias else None
    plain = ExpertLinear(torch.nn.Parameter(stored), biases, transposed=transposed).requires_grad_(False)
    quantised = empty_4bit(plain, spec, "experts.up_proj")
    quantised.quantize_(plain.weight, plain.bias)
    return plain, quantised


def groups_of(*experts):
    return by_expert(torch.tensor(experts, dtype=torch.int64).unsqueeze(1), EXPERTS)[0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize(("quant_type", "blocksize"), [("nf4", 64), ("fp4", 128)])
def test_each_expert_has_the_bytes_of_its_matrix_alone(quant_type, blocksize, double_quant, transposed):
    """Else a run over 4-bit experts is a run over another base than the one that bitsandbytes makes."""
    spec = QuantSpec(quant_type=quant_type, blocksize=blocksize, double_quant=double_quant)
    plain, ours = layers(spec, transposed=transposed)
    blocks = IN * OUT // blocksize
    for expert in range(EXPERTS):
        matrix = plain.weight[expert].T.contiguous() if transposed else plain.weight[expert]
        packed, state = bnb.quantize_4bit(
            matrix, blocksize=blocksize, quant_type=quant_type, compress_statistics=double_quant
        )
        span = slice(expert * blocks, (expert + 1) * blocks)
        assert torch.equal(ours.weight[span].view(-1), packed.view(-1))
        assert isinstance(state, QuantState)
        if double_quant:
            second = torch.cat([state.state2.absmax, state.offset.view(1)])
            assert torch.equal(ours.scales[span], state.absmax)
            assert torch.equal(ours.nested[expert].view(torch.float32), second)
            assert torch.equal(functional.nested_code(second.device), state.state2.code)
        else:
            assert torch.equal(ours.scales[span].view(torch.float32).view(-1), state.absmax)
            assert ours.nested is None


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double_quant", [True, False])
def test_product_and_gradient_are_those_over_dequantised_weights(double_quant, transposed):
    """Rows must meet their own expert's scales, forwards and backwards; experts 1 and 4 get none."""
    _, ours = layers(QuantSpec(compute_dtype=torch.float32, double_quant=double_quant), transposed=transposed)
    plain = in_16bit(ours, torch.float32)
    assert plain.weight.shape == ((EXPERTS, IN, OUT) if transposed else (EXPERTS, OUT, IN))
    groups = groups_of(3, 0, 2, 2, 0, 3, 3)
    found = []
    for layer in (ours, plain):
        x = torch.randn(7, IN, generator=torch.Generator().manual_seed(1)).requires_grad_()
        y = layer(x, groups)
        y.square().sum().backward()
        found.append((y, x.grad))
    for mine, wanted in zip(*found, strict=True):
        assert (mine - wanted).norm() <= 1e-6 * wanted.norm()
    torch.library.opcheck(
        torch.ops.adalora_scale.matmul_experts_4bit.default,
        (x.detach().requires_grad_(), ours.weight, ours.scales, ours.nested, groups.ends, 64, "nf4", (OUT, IN)),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_only_experts_with_rows_are_dequantised_and_one_at_a_time(monkeypatch):
    """Else a forward needs the whole layer in 16 bits, which is what 4 bits are to save."""
    _, ours = layers(FP32)
    seen, alive = [], []
    real = expert_operators.expert_weight

    def watched(expert, *arguments):
        assert sum(reference() is not None for reference in alive) <= 1
        weight = real(expert, *arguments)
        seen.append(expert)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(expert_operators, "expert_weight", watched)
    x = torch.randn(4, IN, requires_grad=True)
    ours(x, groups_of(2, 0, 2, 4)).sum().backward()
    assert seen == [0, 2, 4, 0, 2, 4]
    assert ours(torch.randn(0, IN), groups_of()).shape == (0, OUT)


def test_experts_that_blocks_do_not_divide_are_refused_by_name():
    """A block of two experts' weights would mix their scales."""
    layer = ExpertLinear(torch.nn.Parameter(torch.zeros(4, 8, 6)))  # 192 weights, but 48 an expert
    with pytest.raises(UserError, match=r"48 weights of 'a\.experts\.down_proj' \(8 x 6\).*'down_proj' to model\.bnb"):
        empty_4bit(layer, FP32, "a.experts.down_proj")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_quantised_and_computes_with_it(kind):
    """Experts in 4 bits, routers not; logits are those over the dequantised weights; adapters go on top."""
    model = tiny(kind, dtype=torch.float32)
    quantize_model(model, FP32)
    experts = [name for name, module in model.named_modules() if isinstance(module, ExpertLinear4bit)]
    assert experts
    routers = [n for n, p in model.named_parameters() if p.is_floating_point() and ("router" in n or ".gate." in n)]
    assert routers
    ids = torch.arange(3, 23).view(2, 10) % VOCABULARY
    logits = model(ids).logits
    inject_adalora(model, AdaLoraConfig(init_r=2, target_r=1, target_modules=[experts[0].rsplit(".", 1)[1]]))
    layer = model.get_submodule(experts[0])
    assert isinstance(layer, AdaLoraLayer) and layer.matrices == layer.base_layer.experts
    torch.testing.assert_close(model(ids).logits, logits)  # λ is zero
    plain = tiny(kind, dtype=torch.float32)
    quantize_model(plain, FP32)
    dequantize_model(plain, torch.float32)
    assert not any(isinstance(module, ExpertLinear4bit) for module in plain.modules())
    torch.testing.assert_close(plain(ids).logits, logits, rtol=1e-4, atol=1e-5)


def test_shares_and_skipped_experts():
    """The line printed at start must say what is in 4 bits, and leaving experts out must leave all of them out."""
    model = quantize_model(tiny("mixtral", dtype=torch.float32), FP32)
    experts, attention, head = 2 * 5 * 3 * 16 * 24, 2 * 4 * 16 * 16, 64 * 16  # routers are a class of their own
    assert quantized_share(model) == (experts + attention, experts + attention + head)
    assert coverage(model).linear_weights == experts + attention + head
    skipped = quantize_model(tiny("mixtral", dtype=torch.float32), FP32, ["experts"])
    assert quantized_share(skipped) == (attention, experts + attention + head)
    assert f"{attention / (experts + attention + head):.1%} of the linear weights" in streaming.describe(skipped)


def test_trained_in_full_is_refused():
    """Codes have no gradient."""
    model = tiny("qwen3_moe", dtype=torch.float32)
    split_all_experts(model)
    quantize_model(model, FP32)
    config = AdaLoraConfig(init_r=2, target_r=1, target_modules=["q_proj"], modules_to_save=["experts"])
    with pytest.raises(UserError, match=r"experts' is in 4 bits"):
        inject_adalora(model, config)


@pytest.mark.parametrize("kind", ["jetmoe", "longcat_flash", "zaya", "afmoe"])
def test_a_router_is_not_rounded_whatever_it_is_made_of(kind):
    """Else tokens go to other experts: of some families routers are plain nn.Linear layers."""
    model = small_model(kind, "causal")
    chosen = routers(model)
    assert any(isinstance(inside, torch.nn.Linear) for name in chosen for inside in model.get_submodule(name).modules())
    targets = quantization_targets(model)
    assert targets and not [t for t in targets if any(f"{t}.".startswith(f"{name}.") for name in chosen)]
