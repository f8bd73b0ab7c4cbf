"""`torch.compile` over 4-bit bases with adapters: one graph forward and backward, eager's values, bytes saved."""

import copy

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from adalora_scale.adalora.adaptables.linear4bit import QuantisedLinear
from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.quantization.linear import Linear4bit, quantize_model
from adalora_scale.quantization.spec import QuantSpec
from tests.toy import Toy, adapters_of

CONFIG = AdaLoraConfig(init_r=6, target_r=4, tinit=1, tfinal=1, deltaT=1)
IDS = torch.arange(24).view(2, 12)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def adapted(*, dtype=torch.float32, **options):
    """A toy over a 4-bit base, in the dtype that the base computes in, its adapters not zero."""
    torch.manual_seed(0)
    model = quantize_model(Toy(width=64, wide=128).to(dtype), QuantSpec(compute_dtype=dtype, **options))
    inject_adalora(model, CONFIG)
    for _, layer in adapter_layers(model):
        torch.nn.init.normal_(layer.lora_E)
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    return model


@pytest.fixture
def by_operations(monkeypatch):
    """A call that is computed by the plain operations, as a compiler is given them."""

    def compute(call):
        with monkeypatch.context() as patched:
            patched.setattr(QuantisedLinear, "product", None)
            return call()

    return compute


def gradients_of(model, call):
    call(IDS).float().square().mean().backward()
    return {(n, f): w.grad for n, own in adapters_of(model).items() for f, w in own.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_compiled_is_one_graph_and_equals_eager(quant_type, double_quant, dtype, by_operations):
    """Else every layer is cut in pieces that nothing fuses over, or training depends on who compiles.

    Bit for bit by the same operations; the one function of eager mode rounds the input's gradient once less.
    """
    model = adapted(dtype=dtype, quant_type=quant_type, double_quant=double_quant)
    twin = copy.deepcopy(model)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)  # fullgraph: a break raises
    assert torch.equal(model(IDS), compiled(IDS))
    expected, found = by_operations(lambda: gradients_of(model, model)), gradients_of(twin, compiled)
    assert all(value is not None and value.abs().sum() > 0 for value in expected.values())
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    model.zero_grad()
    fused = gradients_of(model, model)
    assert all((fused[key] - found[key]).norm() <= 8 * torch.finfo(dtype).eps * found[key].norm() for key in found)


def test_a_compiler_that_merges_expressions_keeps_bytes_for_the_backward():
    """Else the 16-bit weights live from forward to backward under torch.compile, and 4 bits save nothing."""
    model = adapted()
    compiled = torch.compile(model, backend="aot_eager_decomp_partition", fullgraph=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        compiled(IDS).sum().backward()
    assert any(tensor.dtype == torch.uint8 for tensor in saved)
    assert not [tuple(t.shape) for t in saved if t.is_floating_point() and t.numel() == 64 * 128]


def test_checkpointed_blocks_compile_to_the_same_gradients(by_operations):
    """Gradient checkpointing runs the forward again inside the backward; a graph break there would end fullgraph."""
    model = adapted()
    twin = copy.deepcopy(model)

    def blockwise(ids):
        x = twin.embed(ids)
        for block in twin.blocks:
            body = lambda x, block=block: x + block["down"](torch.tanh(block["up"](x)))  # noqa: E731
            x = checkpoint(body, x, use_reentrant=False)
        return twin.head(x)

    compiled = torch.compile(blockwise, backend="aot_eager", fullgraph=True)
    expected, found = by_operations(lambda: gradients_of(model, model)), gradients_of(twin, compiled)
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_autocast_changes_neither_product_nor_gradient():
    """compute_dtype is the user's word; a backward called under autocast would else round ∂L/∂x."""
    model = adapted()
    layer = model.blocks[0]["up"].base_layer
    values = []
    for enabled in (False, True):
        x = torch.linspace(-1, 1, 128).view(2, 64).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = layer(x)
            y.backward(torch.ones_like(y) / 3)
        values.append((y.detach(), x.grad))
    assert torch.equal(values[0][0], values[1][0]) and torch.equal(values[0][1], values[1][1])


def test_without_a_compiler_the_bytes_alone_are_saved_too():
    """A base whose 16-bit weights wait for the backward is no 4-bit base."""
    layer = adapted(dtype=torch.bfloat16).blocks[0]["up"].base_layer
    x, saved = torch.randn(2, 64, dtype=torch.bfloat16, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x)
    assert [t.data_ptr() for t in saved] == [t.data_ptr() for t in (layer.weight, layer.scales, layer.nested)]


def test_fake_tensors_see_one_operator():
    """A rehearsal has no bytes to dequantise; a kernel of bitsandbytes would have to be faked one by one."""
    with FakeTensorMode() as fake:
        layer = Linear4bit(64, 128, spec=QuantSpec(compute_dtype=torch.bfloat16))
        x = torch.empty(2, 3, 64, dtype=torch.bfloat16, requires_grad=True)
        names = []

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                names.append(str(func))
                return func(*args, **(kwargs or {}))

        with Watch():
            y = layer(x)
            y.sum().backward()
    assert isinstance(y, FakeTensor) and y.fake_mode is fake and x.grad.shape == x.shape
    quantised = [name for name in names if "4bit" in name]
    assert quantised == ["adalora_scale.matmul_4bit.default", "adalora_scale.matmul_4bit_backward.default"]


@pytest.mark.parametrize("double_quant", [True, False])
def test_the_operators_keep_torchs_rules(double_quant):
    """A fake kernel of another shape, dtype or stride than the real one breaks compiled programs far from here."""
    layer = adapted(double_quant=double_quant).blocks[0]["up"].base_layer
    x = torch.randn(2, 3, 64, requires_grad=True)
    arguments = (x, layer.weight, layer.scales, layer.nested, layer.bias, 64, "nf4", (128, 64))
    torch.library.opcheck(torch.ops.adalora_scale.matmul_4bit.default, arguments)
