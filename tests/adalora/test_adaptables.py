"""Adapters on layers that are not linear: the same function as the base with ΔW added, and the same gradients."""

import copy

import pytest
import torch
from torch import nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.models.opt.modeling_opt import OPTLearnedPositionalEmbedding

from adalora_scale.adalora.adaptables import adaptable_of, block
from adalora_scale.adalora.injection import adapter_layers, coverage, inject_adalora, injection_of
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.adalora.targets import find_targets
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported
from tests.adalora import tiny

CONVOLUTIONS = [
    (nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, dilation=(1, 2)), (2, 3, 9, 8)),
    (nn.Conv2d(3, 5, 3, padding="same", bias=False), (3, 6, 7)),
    (nn.Conv2d(3, 5, 1), (2, 3, 4, 4)),
    (nn.Conv1d(4, 6, 3, stride=2, dilation=2), (2, 4, 11)),
]
EMBEDDINGS = [
    nn.Embedding(11, 6),
    nn.Embedding(11, 6, padding_idx=3),
    nn.Embedding(11, 6, sparse=True),
    Gemma3TextScaledWordEmbedding(11, 6, 0, embed_scale=2.5),
    BartScaledWordEmbedding(11, 6, 1, embed_scale=3.0),
]
IDS = torch.tensor([[0, 3, 1, 10], [3, 3, 5, 2]])


def adapted(base, r=3):
    """The layer in float64 with random triplets, as after training (a padding token's row is still zero)."""
    layer = AdaLoraLayer(copy.deepcopy(base), r=r, scaling=1.7).double()
    still = layer.adaptable.still_rows(layer.base_layer)
    tiny.randomise(nn.ModuleList([layer]))
    with torch.no_grad():
        layer.lora_A[still] = 0
    return layer


def merged(layer):
    """The base with ΔW added to its weight, from the triplets one by one."""
    base, delta = copy.deepcopy(layer.base_layer), 0
    for k in range(layer.r):
        delta = delta + 1.7 * layer.lora_E[k] * torch.outer(layer.lora_B[:, k], layer.lora_A[:, k])
    with torch.no_grad():
        base.weight += (delta.T if layer.adaptable.transposed else delta).reshape(base.weight.shape)
    return base


@pytest.mark.parametrize(("base", "shape"), CONVOLUTIONS, ids=str)
def test_a_convolutions_update_is_that_of_its_merged_weight(base, shape):
    """Else training adapts another function than the merged or exported model has."""
    layer = adapted(base)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), merged(layer)(x), rtol=1e-12, atol=1e-12)
    assert (layer(x) - layer.base_layer(x)).abs().max() > 1e-2


@pytest.mark.parametrize("base", EMBEDDINGS, ids=str)
def test_an_embeddings_update_is_that_of_its_merged_weight(base):
    """Else training adapts another function than the exported model has; a scale is the easy one to forget."""
    layer = adapted(base)
    torch.testing.assert_close(layer(IDS), merged(layer)(IDS), rtol=1e-12, atol=1e-12)
    assert (layer(IDS) - layer.base_layer(IDS)).abs().max() > 1e-2


@pytest.mark.parametrize("base", [CONVOLUTIONS[0][0], nn.Embedding(11, 6), EMBEDDINGS[3]], ids=str)
def test_gradients_are_those_of_the_merged_weight(base):
    """Else the update learns in another direction than the loss says."""
    layer = adapted(base)
    x = IDS if isinstance(base, nn.Embedding) else torch.randn(2, 3, 9, 8, dtype=torch.float64)
    weight = layer.weight.detach().clone()

    def loss(a, e, b):
        delta = block(a.T, 1.7 * e, b, 0, weight.shape[0], transposed=layer.adaptable.transposed).view_as(weight)
        return torch.func.functional_call(layer.base_layer, {"weight": weight + delta}, (x,)).add(1).pow(2).sum()

    factors = [layer.lora_A, layer.lora_E, layer.lora_B]
    twins = [factor.detach().clone().requires_grad_() for factor in factors]
    expected = torch.autograd.grad(loss(*twins), twins)
    got = torch.autograd.grad(layer(x).add(1).pow(2).sum(), factors)
    still = layer.adaptable.still_rows(base)
    expected[0][still] = 0
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_padding_token_stays_what_it_is():
    """Else padding, which the base keeps fixed, moves with every step."""
    layer = AdaLoraLayer(nn.Embedding(11, 6, padding_idx=3), r=3, scaling=1.0)
    with torch.no_grad():
        layer.lora_E.fill_(1.0)
    assert layer.lora_A[3].abs().max() == 0 and layer.lora_A[4].abs().min() > 0
    (layer(IDS) + 1).pow(2).sum().backward()  # the padding row itself is zero
    assert layer.lora_A.grad[3].abs().max() == 0 and layer.lora_A.grad[10].abs().max() > 0
    assert torch.equal(layer(torch.tensor([3])), layer.base_layer(torch.tensor([3])))


def test_dropout_drops_whole_tokens_of_an_embedding():
    """Else lora_dropout does nothing there, in silence."""
    layer = AdaLoraLayer(nn.Embedding(11, 6), r=3, scaling=1.0, dropout=0.5)
    tiny.randomise(nn.ModuleList([layer]))
    ids = torch.zeros(400, dtype=torch.long)
    moved = layer(ids) - layer.base_layer(ids)
    dropped = (moved.abs().max(1).values == 0).float().mean()
    assert 0.4 < dropped < 0.6
    layer.eval()
    kept = (layer(ids) - layer.base_layer(ids))[0]
    torch.testing.assert_close(moved[moved.abs().max(1).values > 0][0], 2 * kept, rtol=1e-4, atol=1e-5)


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x):
        return super().forward(x - x.mean())


@pytest.mark.parametrize(
    ("base", "word"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), "groups=2"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding_mode='reflect'"),
        (StandardisedConv2d(4, 4, 3), "forward"),
        (nn.Embedding(4, 4, max_norm=1.0), "max_norm"),
        (nn.Embedding(4, 4, scale_grad_by_freq=True), "scale_grad_by_freq"),
        (OPTLearnedPositionalEmbedding(4, 4), "forward"),
        (nn.Conv3d(2, 2, 1), "Conv3d"),
        (nn.LayerNorm(4), "Embedding"),
    ],
    ids=str,
)
def test_settings_that_would_train_something_else_are_refused(base, word):
    """Else the adapter's function is not the merged weight's."""
    with pytest.raises(Unsupported, match=word):
        AdaLoraLayer(base, r=2, scaling=1.0)


def test_what_torch_computes_around_a_layers_forward(monkeypatch):
    """Else an adapter is never trained (attention's output), or only left out when the model is evaluated."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    batch, padded = torch.ones(2, 5, 16), torch.arange(5) > torch.tensor([[4], [2]])
    config = AdaLoraConfig(init_r=4, target_r=2)
    with pytest.raises(Unsupported, match=r"'layers\.0\.self_attn\.out_proj'.*adalora\.exclude_modules"):
        inject_adalora(model, config.replace(target_modules=["out_proj"]))
    inject_adalora(model, config).eval()
    assert coverage(model).matrices == 2
    with torch.no_grad():
        for _, layer in adapter_layers(model):
            layer.lora_E.fill_(5.0)
        found = model(batch, src_key_padding_mask=padded)
        monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
        torch.testing.assert_close(found[~padded], model(batch, src_key_padding_mask=padded)[~padded])


def test_model_code_that_reads_a_layers_settings():
    """Else Whisper, whose encoder multiplies the strides of its convolutions, ends in an AttributeError."""
    layer = AdaLoraLayer(nn.Conv1d(4, 6, 3, stride=2, padding=1), r=2, scaling=1.0)
    assert (layer.stride, layer.padding, layer.in_channels, layer.in_features) == ((2,), (1,), 4, 12)
    layer = AdaLoraLayer(nn.Embedding(11, 6, padding_idx=0), r=2, scaling=1.0)
    assert (layer.padding_idx, layer.num_embeddings, layer.embedding_dim) == (0, 11, 6)


def test_sides_do_not_come_from_the_weight():
    """Else an adapter under ZeRO-3, where a partitioned weight has shape (0,), has no rows."""
    for base, expected in [
        (nn.Linear(4, 5), (4, 5)), (nn.Conv2d(3, 5, (3, 2)), (18, 5)), (nn.Conv1d(3, 5, 4), (12, 5)),
        (nn.Embedding(11, 6), (11, 6)),
    ]:  # fmt: skip
        base.weight.data = torch.empty(0)
        assert adaptable_of(base).sides(base) == expected


def test_half_precision_embedding_keeps_its_dtype():
    """Else a float32 row reaches layers in bfloat16."""
    layer = AdaLoraLayer(nn.Embedding(11, 6).bfloat16(), r=3, scaling=1.0)
    assert layer(IDS).dtype == torch.bfloat16 and layer.lora_A.dtype == torch.float32


def test_all_linear_stays_linear_and_names_reach_the_others():
    """Else a recipe that names no embedding suddenly trains one."""
    model = tiny.gpt2()
    targets = find_targets(model, AdaLoraConfig(init_r=4, target_r=2))
    assert targets and not any("wte" in name or "wpe" in name for name in targets)
    config = AdaLoraConfig(init_r=4, target_r=2, target_modules=["wte", "c_attn"])
    inject_adalora(model, config)
    found = coverage(model)
    assert found.other_adapted == 64 * 32 and found.adapted_weights == 2 * 32 * 96 and found.matrices == 3
    assert found.adapter_parameters == 4 * (64 + 32 + 1) + 2 * 4 * (32 + 96 + 1)
    assert "2,048 weights of other layers" in str(found)


def test_an_adapter_on_a_tied_embedding_leaves_the_head_alone():
    """Else the update of the embedding comes out of the head too, without anyone having asked."""
    model = tiny.gpt2().eval()
    ids = torch.arange(12).view(1, 12)
    hidden = model.transformer(ids).last_hidden_state
    before = model.lm_head(hidden)
    inject_adalora(model, AdaLoraConfig(init_r=4, target_r=2, target_modules=["wte"]))
    tiny.randomise(model)
    assert torch.equal(model.lm_head(hidden), before)
    assert not torch.allclose(model.transformer(ids).last_hidden_state, hidden)


def test_what_a_model_carries_is_one_object_and_not_in_its_state():
    """Else a state_dict names things that no base has, or readers look for four attributes again.

    Beside it stands only what keeps `save_pretrained` from writing the base under the wrappers' names.
    """
    model = tiny.gpt2()
    before = set(vars(model))
    inject_adalora(model, AdaLoraConfig(init_r=4, target_r=2))
    assert set(vars(model)) - before == {"adalora", "save_pretrained"}
    assert injection_of(nn.Sequential(model)) is model.adalora
    assert model.adalora.base_fingerprint and model.adalora.base_digests and model.adalora.total_step is None
    assert not any("adalora" in key for key in model.state_dict())
