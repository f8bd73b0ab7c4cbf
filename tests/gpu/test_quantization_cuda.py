"""4-bit bases on a real GPU: bitsandbytes' kernels there, bytes through NCCL, loading straight to the card."""

import itertools

import bitsandbytes as bnb
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, LlamaConfig

from adalora_scale.config import AdaLoraConfig, DataConfig, Fsdp2Config, ModelConfig, RunConfig
from adalora_scale.engines.fsdp2_place import shard_fsdp2
from adalora_scale.experts.groups import by_expert
from adalora_scale.placing import streaming
from adalora_scale.quantization import functional
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.quantization.linear import Linear4bit
from adalora_scale.quantization.spec import QuantSpec

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

DEVICE, BACKEND = torch.device("cuda"), "nccl"
ROWS, COLUMNS = 384, 1024
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def exact_float32():
    """TF32 would hide a wrong kernel behind its own error."""
    torch.backends.cuda.matmul.allow_tf32 = False  # torch's default, too
    torch.manual_seed(0)


@pytest.fixture
def one_rank(monkeypatch):
    """A process group of this process alone, as torchrun would start it."""
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init_process_group(BACKEND, store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh(DEVICE.type, (1,))
    dist.destroy_process_group()


def quantized(weight, spec, bias=None):
    layer = Linear4bit(COLUMNS, ROWS, spec=spec, bias=bias is not None, dtype=weight.dtype, device=DEVICE)
    layer.quantize_(weight, bias)
    return layer


def tensors_of(model):
    """Every parameter and 4-bit buffer of a model, whole, by name."""
    named = dict(model.named_parameters())
    named |= {name: buffer for name, buffer in model.named_buffers() if name.endswith("nested")}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach() for name, t in named.items()}


@pytest.mark.parametrize("double_quant", [True, False])
def test_experts_have_bitsandbytes_bytes_and_their_product(double_quant):
    """Each expert's bytes are those of its matrix alone, on the card too, and rows meet their own expert."""
    spec = QuantSpec(compute_dtype=torch.float32, double_quant=double_quant)
    layer = ExpertLinear4bit(3, COLUMNS, ROWS, spec=spec, device=DEVICE)
    weight = torch.randn(3, ROWS, COLUMNS, device=DEVICE)
    layer.quantize_(weight)
    for expert in range(3):
        packed, state = bnb.functional.quantize_4bit(weight[expert], quant_type="nf4", compress_statistics=double_quant)
        span = slice(expert * layer.blocks, (expert + 1) * layer.blocks)
        assert torch.equal(layer.weight[span].view(-1), packed.view(-1))
        assert torch.equal(layer.scales[span].view(-1), functional.as_bytes(state.absmax).view(-1))
    x = torch.randn(5, COLUMNS, device=DEVICE, requires_grad=True)
    groups, _ = by_expert(torch.tensor([[2], [0], [0], [2], [2]], device=DEVICE), 3)
    y = layer(x, groups)
    y.sum().backward()
    own = layer.dequantize(torch.float32)[groups.expert_of_row]
    torch.testing.assert_close(y, torch.einsum("si,soi->so", x, own), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(x.grad, own.sum(1), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 64, 2048])  # bitsandbytes has another kernel for one row, some, and many
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_output_and_gradient_are_the_dequantised_weights(quant_type, dtype, rows):
    """They may be twice as far from float64 as those of an nn.Linear of the same weights and dtype.

    In float32 a thousand terms summed in another order may differ by more than that, 2e-6 of the whole.
    """
    spec = QuantSpec(quant_type=quant_type, compute_dtype=dtype)
    weight = torch.randn(ROWS, COLUMNS, device=DEVICE, dtype=dtype)
    layer = quantized(weight, spec)
    exact, rounded = layer.dequantize(torch.float32).double(), layer.dequantize(dtype)
    # The code book has 16 values: the largest step is under a third of a block's largest weight.
    blocks = weight.float().view(-1, spec.blocksize)
    assert ((exact.view_as(blocks) - blocks).abs().amax(1) <= 0.3 * blocks.abs().amax(1)).all()
    x = torch.randn(rows, COLUMNS, device=DEVICE, dtype=dtype, requires_grad=True)
    gradient = torch.randn(rows, ROWS, device=DEVICE, dtype=dtype)
    y = layer(x)
    y.backward(gradient)
    for got, plain, wanted in (
        (y, F.linear(x, rounded), x.double() @ exact.T),
        (x.grad, gradient @ rounded, gradient.double() @ exact),
    ):
        assert got.dtype == dtype
        allowed = max(2 * (plain.double() - wanted).norm(), 2e-6 * wanted.norm())
        assert (got.double() - wanted).norm() <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("blocksize", [64, 128])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bytes_outputs_and_gradients_are_bitsandbytes(quant_type, blocksize, double_quant, dtype):
    """Else a model fine-tuned here is another one when transformers loads it."""
    spec = QuantSpec(quant_type=quant_type, blocksize=blocksize, double_quant=double_quant, compute_dtype=dtype)
    weight, bias = torch.randn(ROWS, COLUMNS).to(dtype), torch.randn(ROWS).to(dtype)
    theirs = bnb.nn.Linear4bit(
        COLUMNS, ROWS, compute_dtype=dtype, quant_type=quant_type, compress_statistics=double_quant
    )
    theirs.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type=quant_type, blocksize=blocksize,
        compress_statistics=double_quant, module=theirs,
    )  # fmt: skip
    theirs.bias = nn.Parameter(bias.clone(), requires_grad=False)
    theirs = theirs.to(DEVICE).train()
    layer = quantized(weight.to(DEVICE), spec, bias.to(DEVICE))
    state = theirs.weight.quant_state
    assert torch.equal(layer.weight.view(-1), theirs.weight.data.view(-1))
    if double_quant:
        second, mean, code = functional.split_nested(layer.nested)
        assert torch.equal(layer.scales, state.absmax)
        assert torch.equal(second, state.state2.absmax) and torch.equal(code, state.state2.code)
        assert mean == state.offset
    else:
        assert torch.equal(layer.scales.view(torch.float32).view(-1), state.absmax)
    for rows in (1, 64, 2048):
        x = torch.randn(rows, COLUMNS, device=DEVICE, dtype=dtype)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [module(value) for module, value in zip((theirs, layer), inputs, strict=True)]
        assert torch.equal(*outputs)
        gradient = torch.randn_like(outputs[0])
        for output in outputs:
            output.backward(gradient)
        assert torch.equal(inputs[0].grad, inputs[1].grad)


def test_slices_of_blocks_quantise_to_the_bytes_of_the_whole():
    """Ranks quantise only their own blocks, in pieces."""
    spec = QuantSpec()
    weight = torch.randn(ROWS, COLUMNS, device=DEVICE)
    packed, scales, nested = functional.quantize(weight, spec)
    cuts = [0, 1, 17, 17, 200, ROWS * COLUMNS // 64]
    parts = [functional.quantize_blocks(weight.view(-1)[a * 64 : b * 64], spec) for a, b in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat([part[0] for part in parts]), packed)
    whole = functional.encode_scales(torch.cat([part[1] for part in parts]), spec)
    assert torch.equal(whole[0], scales) and torch.equal(whole[1], nested)


@pytest.mark.parametrize("double_quant", [True, False])
def test_every_byte_survives_the_gathering(one_rank, double_quant):
    """Bytes that are NaN in a floating-point type get lost where a collective or a cast takes them for numbers."""
    spec = QuantSpec(double_quant=double_quant)
    layer = quantized(torch.randn(ROWS, COLUMNS, device=DEVICE), spec)
    every = torch.arange(layer.weight.numel(), device=DEVICE).to(torch.uint8)
    with torch.no_grad():
        layer.weight.copy_(every.view_as(layer.weight))
        layer.scales.copy_(every[: layer.scales.numel()].view_as(layer.scales))
    expected = [tensor.clone() for tensor in (layer.weight, layer.scales, layer.nested)]
    model = nn.Sequential(layer, nn.Linear(ROWS, 8, device=DEVICE))  # something to train beside it
    model[1].requires_grad_(True)
    fully_shard(model, mesh=one_rank, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    seen = []

    def look(module, inputs):
        assert not isinstance(module.weight, DTensor)
        seen.append([tensor.detach().clone() for tensor in (module.weight, module.scales, module.nested)])

    layer.register_forward_pre_hook(look)
    model(torch.zeros(2, COLUMNS, device=DEVICE, requires_grad=True))
    assert len(seen) == 1 and all(map(torch.equal, expected, seen[0]))
    gathered = torch.empty_like(every)
    dist.all_gather_into_tensor(gathered, every)
    assert torch.equal(gathered, every)


@pytest.fixture
def checkpoint(tmp_path):
    """A random Llama in bfloat16, in several files."""
    shape = LlamaConfig(
        vocab_size=512, hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(shape).to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    return tmp_path, model


def run_config(folder, *, load_in_4bit):
    return RunConfig(
        model=ModelConfig(model_name_or_path=str(folder), load_in_4bit=load_in_4bit),
        data=DataConfig(train=""),
        adalora=AdaLoraConfig(),
        training={"output_dir": str(folder)},
    )


def test_a_base_streams_straight_to_the_card(checkpoint):
    """No copy of the model in 16 bits on the card: its memory stays under what is kept and two layers."""
    folder, original = checkpoint
    layer_bytes = sum(p.nbytes for p in original.model.layers[0].parameters())
    if DEVICE.type == "cuda":
        functional.check_kernels(QuantSpec(), DEVICE, torch.bfloat16)  # loads libraries, which take memory once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    model = streaming.load_whole(streaming.begin(run_config(folder, load_in_4bit=True), device=DEVICE))
    held = [*model.parameters(), *model.buffers()]
    assert all(tensor.device.type == DEVICE.type for tensor in held)
    if DEVICE.type == "cuda":
        peak = torch.cuda.max_memory_allocated() - before
        assert peak <= sum(tensor.nbytes for tensor in held) + 2 * layer_bytes
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(layers) == 4 * 7
    for name, layer in layers.items():
        weight = original.get_submodule(name).weight.detach().to(DEVICE)
        packed, scales, nested = functional.quantize(weight, layer.spec)
        for got, wanted in ((layer.weight, packed), (layer.scales, scales), (layer.nested, nested)):
            assert torch.equal(got, wanted)
    assert torch.equal(model.lm_head.weight.cpu(), original.lm_head.weight)
    logits = model(input_ids=torch.arange(32, device=DEVICE)[None]).logits
    assert logits.isfinite().all()


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_a_sharded_load_gives_the_tensors_of_a_whole_one(one_rank, checkpoint, load_in_4bit):
    """FSDP2 shards on the meta device, then the rank's rows are read to the card."""
    config = run_config(checkpoint[0], load_in_4bit=load_in_4bit)
    models = []
    for sharded in (False, True):
        torch.manual_seed(1)
        started = streaming.begin(config, device=DEVICE)
        streaming.inject(started, config.adalora)
        if not sharded:
            models.append(streaming.load_whole(started))
            continue
        models.append(
            streaming.load_sharded(
                started, lambda model: shard_fsdp2(model, Fsdp2Config(), device_type=DEVICE.type, bf16=False), DEVICE
            )
        )
    whole, shards = map(tensors_of, models)
    assert whole.keys() == shards.keys()
    assert all(torch.equal(whole[name], shards[name]) for name in whole)
    ids = torch.arange(32, device=DEVICE)[None]
    with torch.no_grad():
        outputs = [model(input_ids=ids, use_cache=False).logits for model in models]
    assert torch.equal(*outputs)
