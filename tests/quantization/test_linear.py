"""The 4-bit linear layer against bitsandbytes' own, byte for byte and bit for bit."""

import itertools

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from adalora_scale.adalora.injection import adapter_layers, coverage, inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.quantization import functional
from adalora_scale.quantization.linear import (
    Linear4bit,
    dequantize_model,
    quantization_targets,
    quantize_model,
    quantized_share,
)
from adalora_scale.quantization.spec import QuantSpec
from tests.toy import Toy

ROWS, COLUMNS = 96, 256


def theirs(weight, bias, spec):
    packed = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=spec.quant_type, blocksize=spec.blocksize,
        compress_statistics=spec.double_quant,
    ).to("cpu")  # fmt: skip
    layer = bnb.nn.Linear4bit(COLUMNS, ROWS, bias=bias is not None, compute_dtype=spec.compute_dtype)
    layer.weight, layer.quant_state = packed, packed.quant_state
    packed.module = layer
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
    return layer.train()


def ours(weight, bias, spec):
    layer = Linear4bit(COLUMNS, ROWS, spec=spec, bias=bias is not None, dtype=weight.dtype)
    layer.quantize_(weight, bias)
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_outputs_and_gradients_are_bitsandbytes(quant_type, blocksize, double_quant, dtype):
    """Else a model fine-tuned here is another one when transformers loads it."""
    spec = QuantSpec(quant_type=quant_type, blocksize=blocksize, double_quant=double_quant, compute_dtype=dtype)
    torch.manual_seed(0)
    weight, bias = torch.randn(ROWS, COLUMNS).to(dtype), torch.randn(ROWS).to(dtype)
    reference, layer = theirs(weight, bias, spec), ours(weight, bias, spec)
    state = reference.weight.quant_state
    assert torch.equal(layer.weight.view(-1), reference.weight.data.view(-1))
    if double_quant:
        second, mean, code = functional.split_nested(layer.nested)
        assert torch.equal(layer.scales, state.absmax)
        assert (
            torch.equal(second, state.state2.absmax) and mean == state.offset and torch.equal(code, state.state2.code)
        )
    else:
        assert torch.equal(layer.scales.view(torch.float32).view(-1), state.absmax)
    assert torch.equal(layer.dequantize(dtype), bnb.functional.dequantize_4bit(reference.weight.data, state))
    x = torch.randn(3, 7, COLUMNS).to(dtype)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [module(value) for module, value in zip((reference, layer), inputs, strict=True)]
    assert torch.equal(*outputs)
    gradient = torch.randn_like(outputs[0])
    for output in outputs:
        output.backward(gradient)
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert (layer.dequantize(torch.float32) - weight.float()).abs().max() < 0.3 * weight.float().abs().max()


def test_compute_dtype_is_used_and_the_input_dtype_comes_back():
    """As in bitsandbytes: products in compute_dtype, residual stream in its own."""
    torch.manual_seed(0)
    weight, x = torch.randn(ROWS, COLUMNS), torch.randn(2, COLUMNS)
    spec = QuantSpec(compute_dtype=torch.bfloat16)
    layer = ours(weight, None, spec)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y, theirs(weight, None, spec)(x))
    assert not torch.equal(y, ours(weight, None, QuantSpec(compute_dtype=torch.float32))(x))


def test_the_dequantised_weight_is_not_kept_for_the_backward():
    """Else every layer holds 16-bit weights until the backward and 4 bits save nothing."""
    layer = ours(torch.randn(ROWS, COLUMNS), None, QuantSpec(compute_dtype=torch.float32))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(torch.randn(4, COLUMNS, requires_grad=True)).sum()
    assert saved and all(tensor.dtype == torch.uint8 for tensor in saved)
    assert sum(tensor.numel() for tensor in saved) < ROWS * COLUMNS


@pytest.mark.parametrize("cast", [nn.Module.half, nn.Module.bfloat16, nn.Module.double])
def test_no_cast_touches_the_bytes(cast):
    """Scales that a cast rounds ruin every weight of their blocks."""
    layer = ours(torch.randn(ROWS, COLUMNS), torch.randn(ROWS), QuantSpec(compute_dtype=torch.float32))
    before = [tensor.clone() for tensor in (layer.weight, layer.scales, layer.nested)]
    cast(layer)
    assert layer.bias.dtype != torch.float32
    assert all(map(torch.equal, before, (layer.weight, layer.scales, layer.nested)))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_that_are_not_finite_are_refused(dtype, value):
    """In 4 bits they would be numbers like all others, and their block's other weights zeros."""
    weight = torch.randn(ROWS, COLUMNS).to(dtype)
    weight[-1, -1] = value
    with pytest.raises(UserError, match="'up' of the base model has values that are not finite"):
        functional.quantize(weight, QuantSpec(), "up")


def test_slices_of_blocks_quantise_to_the_bytes_of_the_whole():
    """Ranks quantise only their own blocks."""
    spec = QuantSpec()
    weight = torch.randn(ROWS, COLUMNS)
    packed, scales, nested = functional.quantize(weight, spec)
    cuts = [0, 1, 17, 17, 200, ROWS * COLUMNS // 64]
    parts = [functional.quantize_blocks(weight.view(-1)[a * 64 : b * 64], spec) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat([part[0] for part in parts]), packed)
    whole = functional.encode_scales(torch.cat([part[1] for part in parts]), spec)
    assert torch.equal(whole[0], scales) and torch.equal(whole[1], nested)


@pytest.mark.parametrize("shape", [(64, 32), (8, 160), (64, 172), (4, 48)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_are_no_multiple_of_a_block(shape, dtype):
    """bitsandbytes' CPU kernel takes the neighbour's scale there: 40 % error instead of 9 %."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    packed, scales, nested = functional.quantize(weight, QuantSpec())
    code = bnb.functional.get_4bit_type("nf4", device="cpu")
    codes = torch.stack([packed.view(-1) >> 4, packed.view(-1) & 15], dim=1).view(-1, 64).long()
    plain = (code[codes] * functional.decode_scales(scales, nested).view(-1, 1)).view(shape)
    assert (plain - weight).norm() < 0.1 * weight.norm()
    assert torch.equal(functional.dequantize(packed, scales, nested, QuantSpec(), shape, dtype), plain.to(dtype))


def test_model_is_quantised_and_dequantised_in_place():
    """Head and embedding stay; Conv1D is taken with its other orientation; the share counts elements."""
    model = Toy(width=32, wide=64)
    model.blocks.append(nn.ModuleDict({"up": Conv1D(64, 32), "down": nn.Linear(64, 32, bias=False)}))
    exact = [block["up"].weight.detach().clone() for block in model.blocks]
    ids = torch.randint(0, 32, (2, 5))
    expected = model(ids)
    quantize_model(model, QuantSpec(compute_dtype=torch.float32), None)
    quantised = model(ids)
    assert 0 < (quantised - expected).abs().max() < expected.abs().max()
    assert quantized_share(model) == (8 * 32 * 64, 8 * 32 * 64 + 32 * 32)
    assert isinstance(model.head, nn.Linear) and model.blocks[3]["up"].transposed
    error = model.blocks[3]["up"].dequantize() - exact[3].T
    assert error.abs().max() < 0.2 * exact[3].abs().max()
    dequantize_model(model, torch.float32)
    assert torch.allclose(model(ids), quantised, atol=1e-6)
    assert quantized_share(model)[0] == 0


def test_skipped_modules_stay():
    """A user keeps what is sensitive, by name endings, and a typo is an error."""
    model = Toy(width=32, wide=64)
    assert len(quantization_targets(model, ["down"])) == 3
    assert len(quantization_targets(model, ["blocks.0"])) == 4
    with pytest.raises(UserError, match=r"bnb_4bit_skip_modules: 'donw' matches no module.*'down'"):
        quantization_targets(model, ["donw"])
    with pytest.raises(UserError, match="no linear layer to quantise"):
        quantization_targets(model, ["blocks"])


class SpecialLinear(nn.Linear):
    """A layer that computes something else than a linear one."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).softmax(-1)


def test_what_cannot_be_quantised():
    """Else it would be quantised wrongly."""
    model = Toy(width=32, wide=64)
    model.blocks[1]["up"] = SpecialLinear(32, 64)
    assert "blocks.1.up" not in quantization_targets(model) and "blocks.1.down" in quantization_targets(model)
    odd = Toy(width=24, wide=42)
    with pytest.raises(UserError, match=r"bnb_4bit_blocksize=64 does not divide the 1008 weights of 'blocks\.0\.up'"):
        quantize_model(odd, QuantSpec())


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"quant_type": "int4"}, "bnb_4bit_quant_type"),
        ({"blocksize": 48}, "bnb_4bit_blocksize"),
        ({"compute_dtype": torch.float64}, "bnb_4bit_compute_dtype"),
    ],
)
def test_options_without_kernels_are_refused(options, key):
    """The kernels would fail later with a message that names no key."""
    with pytest.raises(UserError, match=key):
        QuantSpec(**options)


def test_missing_kernels_show_before_memory_fills(monkeypatch):
    """A machine whose kernels lack a dtype says so on one block."""

    def fail(*args, **kwargs):
        raise NotImplementedError("no kernel for this dtype\nand a long story")

    monkeypatch.setattr(functional, "linear", fail)
    with pytest.raises(
        Unsupported, match=r"no 4-bit kernel on cpu .*compute_dtype=float16 \(no kernel for this dtype\)"
    ):
        functional.check_kernels(QuantSpec(compute_dtype=torch.float16), torch.device("cpu"), torch.float32)


def test_adapters_train_over_a_4_bit_base():
    """Gradients of A, E and B through the frozen layer are those over the dequantised weights."""
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=4, target_r=2)
    model = quantize_model(Toy(width=32, wide=64), QuantSpec(compute_dtype=torch.float32))
    torch.manual_seed(1)
    inject_adalora(model, config)
    torch.manual_seed(0)
    exact = dequantize_model(
        quantize_model(Toy(width=32, wide=64), QuantSpec(compute_dtype=torch.float32)), torch.float32
    )
    torch.manual_seed(1)
    inject_adalora(exact, config)
    assert coverage(model).matrices == 6 and coverage(model).adapted_weights == 6 * 32 * 64
    assert coverage(model).linear_weights == coverage(exact).linear_weights
    ids = torch.randint(0, 32, (2, 5))
    for net in (model, exact):
        for _, layer in adapter_layers(net):
            nn.init.ones_(layer.lora_E)
        net(ids).square().sum().backward()
    for (name, layer), (_, twin) in zip(adapter_layers(model), adapter_layers(exact), strict=True):
        for factor in ("lora_A", "lora_E", "lora_B"):
            assert torch.allclose(getattr(layer, factor).grad, getattr(twin, factor).grad, rtol=1e-4, atol=1e-6), name
        assert all(p.grad is None for p in layer.base_layer.parameters())
    assert torch.equal(layer.delta_weight(), twin.delta_weight())
