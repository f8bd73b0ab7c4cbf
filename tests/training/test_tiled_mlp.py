"""`training.tiled_mlp`: the same gradients from parts of the sequence, at a part of the memory."""

import pytest
import torch
from torch import nn

from adalora_scale import AdaLoraConfig, inject_adalora
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.placing.tiled_mlp import tile_mlps
from adalora_scale.training.arguments import check_training_section
from benchmarks.pricing.counting import peak_bytes
from tests.architectures.small import small_model
from tests.training.short_run import config

TILES = 3


def adapted(kind="llama", dropout=0.0):
    torch.manual_seed(0)
    model = small_model(kind, "causal").train()
    inject_adalora(
        model, AdaLoraConfig(target_modules="all-linear", init_r=4, target_r=2, lora_dropout=dropout, preset="paper")
    )
    for name, parameter in model.named_parameters():
        if name.endswith("lora_E"):
            nn.init.normal_(parameter)
    return model


def gradients(model, **options):
    ids = torch.arange(2 * 20).view(2, 20) % model.config.vocab_size
    if options:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(options)
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("options", [{}, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma2", "phi"])
def test_gradients_are_those_of_whole_sequences(kind, options):
    """20 tokens in 3 parts, which do not divide them, checkpointed blocks among them."""
    model = adapted(kind)
    whole = gradients(adapted(kind), **options)
    assert len(tile_mlps(model, TILES)) == model.config.num_hidden_layers
    tiled = gradients(model, **options)
    assert whole.keys() == tiled.keys() and any(".mlp." in name for name in whole)
    for name, value in whole.items():
        assert torch.allclose(tiled[name], value, rtol=0, atol=1e-6 * max(value.abs().max().item(), 1e-3)), name


def test_each_part_is_worked_on_by_itself():
    """Else the wide tensors are whole after all: the MLP sees parts, in the forward and again in the backward."""
    model = adapted()
    mlps = tile_mlps(model, TILES)
    seen = []
    mlps[0].gate_proj.register_forward_hook(lambda module, inputs, output: seen.append(output.shape[1]))
    gradients(model)
    tried, worked = seen[:3], seen[3:]
    assert tried == [8, 4, 4] and worked[:3] == [7, 7, 6] and sorted(worked[3:]) == [6, 7, 7]


def test_one_token_at_a_time_and_evaluation_are_what_they_were():
    model = adapted().eval()
    prompt = torch.arange(1, 10)[None]
    before = model.generate(prompt, max_new_tokens=5, do_sample=False), model(prompt).logits
    tile_mlps(model, TILES)
    after = model.generate(prompt, max_new_tokens=5, do_sample=False), model(prompt).logits
    assert torch.equal(before[0], after[0])
    assert torch.allclose(before[1], after[1], atol=1e-6)


def test_dropout_draws_the_same_in_the_backward_pass():
    """Else gradients are of another network than the loss."""
    model = adapted(dropout=0.5)
    mlp = tile_mlps(model, TILES)[0]
    layer = mlp.down_proj
    drawn = []
    layer.dropout.register_forward_hook(lambda module, inputs, output: drawn.append((output == 0).clone()))
    gradients(model)
    of_parts = [mask for mask in drawn if mask.shape[1] in (6, 7)]
    assert len(of_parts) == 2 * TILES
    for mask in of_parts[:TILES]:
        assert sum(torch.equal(mask, again) for again in of_parts[TILES:] if again.shape == mask.shape) == 1


class Mixes(nn.Module):
    """Works on neighbours, as a convolution over tokens does."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x + torch.roll(x, 1, dims=1))


def test_what_mixes_tokens_is_refused_in_one_line():
    model = adapted()
    for block in model.model.layers:
        block.mlp = Mixes(block.mlp)
    tile_mlps(model, TILES)
    with pytest.raises(Unsupported, match=r"training\.tiled_mlp: Mixes does not work on each token by itself"):
        gradients(model)


def test_what_has_no_mlp_is_refused_in_one_line(tmp_path):
    with pytest.raises(Unsupported, match=r"training\.tiled_mlp=2: the blocks of OPTForCausalLM have no MLP"):
        tile_mlps(small_model("opt", "causal"), 2)
    router = small_model("mixtral", "causal")
    router.config.output_router_logits = True
    with pytest.raises(Unsupported, match=r"training\.tiled_mlp=2 does not go with output_router_logits"):
        tile_mlps(router, 2)
    with pytest.raises(UserError, match=r"training\.tiled_mlp is 0; it must be at least 1"):
        check_training_section(config(tmp_path, "training.tiled_mlp=0"))
    assert tile_mlps(adapted(), 1) == []


@pytest.mark.parametrize("tiles", [2, 4, 8])
def test_memory_of_a_block_falls_by_the_tiles_share(tiles):
    """What is wide (the intermediate tensors) is there for one part at a time."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaMLP

    torch.manual_seed(0)
    shape = LlamaConfig(hidden_size=32, intermediate_size=1024)
    block = nn.Module()
    block.mlp = LlamaMLP(shape).requires_grad_(False)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    inject_adalora(model, AdaLoraConfig(target_modules="all-linear", init_r=4, target_r=2))
    x = torch.randn(1, 4096, 32, requires_grad=True)

    def peak():
        def step():
            block.mlp(x).sum().backward()
            x.grad = None

        step()  # gradients of adapters are there before and after
        before = peak_bytes(lambda: None, "cpu")
        return peak_bytes(step, "cpu") - before

    narrow = 4 * x.nbytes  # its input's and output's kind: not wide, and not tiled
    whole = peak()
    tile_mlps(model, tiles)
    tiled = peak()
    assert abs((tiled - narrow) / ((whole - narrow) / tiles) - 1) < 0.15, (whole, tiled, narrow)


def test_a_run_with_tiles_ends_where_a_run_without_does(tmp_path):
    """The key reaches the model that is trained."""
    from safetensors.torch import load_file

    from adalora_scale.training.run import train

    ended = []
    for tiles in (1, 3):
        folder = tmp_path / str(tiles)
        train(config(folder, f"training.tiled_mlp={tiles}", "adalora.lora_dropout=0", "training.save_strategy=no"))
        ended.append(load_file(folder / "adapter_model.safetensors"))
    assert ended[0].keys() == ended[1].keys()
    assert any(not torch.equal(ended[0][name], ended[1][name]) for name in ended[0])  # sums are made in another order
    for name, value in ended[0].items():
        assert torch.allclose(value, ended[1][name], rtol=1e-4, atol=1e-5), name
