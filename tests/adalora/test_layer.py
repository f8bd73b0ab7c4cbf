"""The adapted linear layer: its forward is the formula, in every precision and under checkpointing."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported
from adalora_scale.quantization.linear import quantize_model
from adalora_scale.quantization.spec import QuantSpec
from tests.adalora.tiny import randomise
from tests.toy import Toy

SCALING = 2.5


def layer_of(base=None, *, r=4, dropout=0.0, random=True):
    torch.manual_seed(0)
    layer = AdaLoraLayer(base or nn.Linear(10, 7), r=r, scaling=SCALING, dropout=dropout)
    return randomise(layer) if random else layer


@pytest.mark.parametrize("base", [nn.Linear(10, 7), nn.Linear(10, 7, bias=False), Conv1D(7, 10)], ids=str)
@pytest.mark.parametrize("shape", [(10,), (3, 10), (2, 3, 10), (0, 10)])
def test_forward_is_the_base_with_delta_added(base, shape):
    """A wrong scale, transpose or diagonal would still train, to something that cannot be merged or loaded by PEFT."""
    layer = layer_of(copy.deepcopy(base))
    x = torch.randn(*shape)
    delta = torch.zeros(7, 10)
    for k in range(4):
        delta += SCALING * layer.lora_E[k].item() * torch.outer(layer.lora_B[:, k], layer.lora_A[:, k])
    weight = layer.weight.T if isinstance(base, Conv1D) else layer.weight
    torch.testing.assert_close(layer.delta_weight(), delta)
    torch.testing.assert_close(layer(x), F.linear(x, weight + delta, layer.bias))


def test_update_is_zero_at_start():
    """Training must start at the base model; and were the factors zero too, nothing would ever learn."""
    layer = layer_of(random=False)
    x = torch.randn(5, 10)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer.lora_E, torch.zeros(4))
    assert 0.01 < layer.lora_A.std() < 0.04
    assert 0.01 < layer.lora_B.std() < 0.04
    layer(x).sum().backward()
    assert layer.lora_E.grad.abs().min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_keeps_float32_adapters(dtype):
    """Adapters in 16 bit lose small updates; an output in float32 breaks the next layer."""
    layer = layer_of(nn.Linear(10, 7).to(dtype))
    exact = layer_of(nn.Linear(10, 7))
    exact.base_layer.load_state_dict(layer.base_layer.state_dict())
    x = torch.randn(6, 10).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    y.float().square().sum().backward()
    for parameter in (layer.lora_A, layer.lora_E, layer.lora_B):
        assert parameter.dtype == parameter.grad.dtype == torch.float32
    expected = exact(x.float())
    assert (y.float() - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_computes_in_the_low_precision(dtype):
    """The adapter would run in float32 under autocast, at many times the cost, and promote the output."""
    layer = layer_of()
    x = torch.randn(6, 10)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    expected = layer(x)
    assert (y.float() - expected).norm() / expected.norm() < 4 * torch.finfo(dtype).eps
    assert not torch.equal(y.float(), expected)
    y.float().sum().backward()
    assert layer.lora_E.grad.dtype == torch.float32


def test_autocast_does_not_round_a_base_that_computes_in_float32():
    """A 4-bit layer keeps its compute dtype under autocast; a sum taken by autocast would round what it computed."""
    base = quantize_model(nn.Sequential(nn.Linear(64, 64)), QuantSpec(compute_dtype=torch.float32))[0]
    layer = layer_of(base, random=False)
    x = torch.randn(3, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), base(x))


def test_the_update_needs_no_tensor_of_the_outputs_size():
    """Of a long row of tokens such a tensor is the largest thing an adapter would make; by plain operations too."""
    layer = layer_of(nn.Linear(10, 700, bias=False))
    made = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if result.numel() == 2 * 30 * 700:
                made.append(result)
            return result

    x = torch.randn(2, 30, 10)
    with Watch():
        y = layer.plain(x, layer.lora_A, layer.lora_E, layer.lora_B)
    assert len({tensor.untyped_storage().data_ptr() for tensor in [*made, y]}) == 2  # the base's, and the sum


def test_dropout_is_on_the_adapter_path_only():
    """Dropout on the base would change the frozen model, dropout in evaluation its answers."""
    layer = layer_of(dropout=0.5)
    x = torch.ones(400, 10)
    with torch.no_grad():
        base = layer.base_layer(x)
        update = layer.eval()(x) - base
        layer.train()
        noisy = layer(x) - base
        assert (noisy - update).abs().max() > 0.1
        torch.testing.assert_close(noisy.mean(0), update.mean(0), rtol=0.1, atol=0.3)  # mean kept; 400 draws
        layer.lora_E.zero_()
        assert torch.equal(layer(x), base)


def test_rank_zero_is_transparent():
    """Modules that lost all triplets are loaded with r = 0."""
    layer = layer_of(r=0, random=False)
    x = torch.randn(3, 10)
    assert torch.equal(layer(x), layer.base_layer(x))
    assert torch.equal(layer.delta_weight(), torch.zeros(7, 10))
    assert sum(p.numel() for p in layer.parameters() if p.requires_grad) == 0


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_gradients_are_equal(use_reentrant):
    """Recomputation with the adapter's dropout or a non-leaf input could part from the plain backward."""
    layer = layer_of(dropout=0.3)
    plain = copy.deepcopy(layer)
    x = torch.randn(6, 10, requires_grad=True)
    torch.manual_seed(1)
    checkpoint(layer, x, use_reentrant=use_reentrant).square().sum().backward()
    gradient, x.grad = x.grad, None
    torch.manual_seed(1)
    plain(x).square().sum().backward()
    assert torch.equal(gradient, x.grad)
    for name, parameter in plain.named_parameters():
        if parameter.requires_grad:
            assert torch.equal(parameter.grad, layer.get_parameter(name).grad), name


def test_deepcopy_and_state_dict_round_trip():
    """Copies must not share weights; loading must restore the function."""
    layer = layer_of()
    x = torch.randn(3, 10)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), layer(x))
    with torch.no_grad():
        other.lora_E += 1
    assert not torch.equal(other(x), layer(x))
    state = layer.state_dict()
    assert set(state) == {"lora_A", "lora_E", "lora_B", "base_layer.weight", "base_layer.bias"}
    other.load_state_dict(state)
    assert torch.equal(other(x), layer(x))


def test_model_on_meta_device_needs_no_memory():
    """70 B models are built on meta first; an adapter on CPU there would never be sharded."""
    with torch.device("meta"):
        model = Toy()
    inject_adalora(model, AdaLoraConfig(init_r=4, target_r=2))
    layers = dict(adapter_layers(model))
    assert len(layers) == 6
    assert all(p.is_meta for layer in layers.values() for p in layer.parameters())
    model.to_empty(device="cpu")
    for layer in layers.values():
        layer.reset_adapter()
        assert not layer.delta_weight().any()
        assert layer.lora_A.std() > 0


def test_shapes_are_tall_and_readable():
    """Sharding over rows relies on the rank being last."""
    layer = layer_of()
    assert layer.lora_A.shape == (10, 4)
    assert layer.lora_B.shape == (7, 4)
    assert layer.lora_E.shape == (4,)
    assert "in_features=10, out_features=7, r=4, scaling=2.5" in repr(layer)


def test_other_layers_are_refused_by_type():
    """The message must say what was found and what to do."""
    with pytest.raises(Unsupported, match=r"Conv3d.*exclude_modules"):
        AdaLoraLayer(nn.Conv3d(3, 4, 3), r=2, scaling=1.0)
