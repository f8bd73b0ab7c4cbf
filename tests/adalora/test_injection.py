"""Which modules get an adapter, and that the model with them is still the model."""

import copy

import pytest
import torch
from torch import nn

from adalora_scale.adalora.injection import (
    adapter_layers,
    coverage,
    inject_adalora,
    plain_name,
)
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.adalora.targets import find_targets
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.errors import Unsupported, UserError
from tests.adalora import tiny
from tests.toy import Toy

ALL = [f"blocks.{i}.{leaf}" for i in range(3) for leaf in ("up", "down")]


def config(**options):
    return AdaLoraConfig(**{"init_r": 4, "target_r": 2, "lora_alpha": 8, **options})


def names_of(model):
    return [name for name, _ in adapter_layers(model)]


def test_all_linear_takes_every_linear_but_the_output_head(toy):
    """An adapter on the head, or a forgotten layer, changes the method's parameter count silently."""
    assert inject_adalora(toy, config()) is toy
    assert names_of(toy) == ALL
    assert type(toy.head) is nn.Linear


def test_only_adapters_are_trainable(toy):
    """A base weight left trainable would be trained by any optimizer built from requires_grad."""
    inject_adalora(toy, config())
    trainable = {name for name, p in toy.named_parameters() if p.requires_grad}
    assert trainable == {f"{name}.lora_{f}" for name in ALL for f in "AEB"}


def test_all_linear_skips_modules_to_save_and_trains_them():
    """A new classifier head must be trained in full, neither frozen nor given an adapter."""
    model = inject_adalora(tiny.bert(), config(modules_to_save=["classifier"]))
    assert type(model.classifier) is nn.Linear
    assert model.classifier.weight.requires_grad
    assert model.classifier.bias.requires_grad
    assert "bert.pooler.dense" in names_of(model)
    assert not model.bert.embeddings.word_embeddings.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"target_modules": ["up"]}, ALL[::2]),
        ({"target_modules": ["1.up", "blocks.2.down"]}, ["blocks.1.up", "blocks.2.down"]),
        ({"target_modules": ["head"]}, ["head"]),
        ({"target_modules": r"blocks\.[02]\.(up|down)"}, ALL[:2] + ALL[4:]),
        ({"exclude_modules": ["up"]}, ALL[1::2]),
        ({"exclude_modules": r".*\.1\..*"}, ALL[:2] + ALL[4:]),
        ({"target_modules": ["up", "down"], "exclude_modules": ["blocks.0.up"]}, ALL[1:]),
        ({"layers_to_transform": 1}, ALL[2:4]),
        ({"layers_to_transform": [0, 2]}, ALL[:2] + ALL[4:]),
        ({"layers_to_transform": [2], "target_modules": ["down"]}, ["blocks.2.down"]),
    ],
    ids=str,
)
def test_selection(toy, options, expected):
    """PEFT users rely on these rules: endings on dot boundaries, one regex over the full name."""
    assert find_targets(toy, config(**options)) == expected
    assert names_of(inject_adalora(toy, config(**options))) == expected


def test_endings_match_whole_parts_only(toy):
    """'p' would otherwise match 'up' (and 'proj' every projection)."""
    with pytest.raises(UserError, match="'p' matches no module"):
        find_targets(toy, config(target_modules=["p"]))


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"target_modules": ["up", "dwn"]}, ["adalora.target_modules", "'dwn'", "'down'"]),
        ({"exclude_modules": ["hed"]}, ["adalora.exclude_modules", "'hed'", "'head'"]),
        ({"modules_to_save": ["haed"]}, ["adalora.modules_to_save", "'haed'", "'head'"]),
        ({"target_modules": "up"}, ["adalora.target_modules", "'up'", "full name"]),
        ({"exclude_modules": r"zzz.*"}, ["adalora.exclude_modules", "'zzz.*'"]),
        ({"target_modules": "("}, ["adalora.target_modules", "'('", "regular expression"]),
        ({"layers_to_transform": [1, 7]}, ["adalora.layers_to_transform", "layer 7"]),
        ({"target_modules": ["up"], "exclude_modules": ["up"]}, ["adalora.exclude_modules"]),
        ({"target_modules": ["head"], "modules_to_save": ["head"]}, ["'head'", "both"]),
    ],
    ids=str,
)
def test_pattern_that_matches_nothing_is_named_and_nothing_is_touched(toy, options, parts):
    """A misspelt pattern would silently train fewer layers (or exclude none)."""
    before = {name: p.requires_grad for name, p in toy.named_parameters()}
    with pytest.raises(UserError) as error:
        inject_adalora(toy, config(**options))
    assert all(part in str(error.value) for part in parts), str(error.value)
    assert {name: p.requires_grad for name, p in toy.named_parameters()} == before


def test_conv1d_delta_equals_the_forward():
    """GPT-2 stores weights transposed; a delta of the wrong orientation would only show after merging."""
    model = tiny.gpt2().eval()
    ids = torch.arange(24).view(2, 12)
    base = copy.deepcopy(model)
    tiny.randomise(inject_adalora(model, config()))
    assert names_of(model)[:2] == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]
    assert len(names_of(model)) == 8
    with torch.no_grad():
        for name, layer in adapter_layers(model):
            base.get_submodule(name).weight += layer.delta_weight().T
        expected, got = base(ids).logits, model(ids).logits
        untouched = tiny.gpt2().eval()(ids).logits
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert (got - untouched).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("module", "type_name"),
    [
        (nn.Conv3d(3, 4, 3), "Conv3d"),
        (nn.Bilinear(8, 4, 4), "Bilinear"),
        (nn.LayerNorm(4), "LayerNorm"),
        (nn.Sequential(nn.Linear(4, 4)), "Sequential"),
    ],
)
def test_target_that_is_no_linear_layer_is_refused_by_type(module, type_name):
    """PEFT users name embeddings and convolutions; wrapping one would fail inside the first forward."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.add_module("odd", module)
    with pytest.raises(Unsupported, match=type_name):
        inject_adalora(model, config(target_modules=["odd"]))
    assert names_of(model) == []


class Tied(nn.Module):
    """One linear layer under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.nested = nn.ModuleDict({"again": self.first})
        self.last = nn.Linear(6, 6)

    def forward(self, x):
        return self.last(self.nested["again"](torch.tanh(self.first(x))))


def test_layer_under_two_names_is_adapted_in_both_places():
    """One of the two places would go on without the adapter: half-adapted, and no error."""
    torch.manual_seed(0)
    model = Tied()
    merged = copy.deepcopy(model)
    tiny.randomise(inject_adalora(model, config()))
    assert names_of(model) == ["first", "last"]
    assert model.nested["again"] is model.first
    with torch.no_grad():
        for name, layer in adapter_layers(model):
            merged.get_submodule(name).weight += layer.delta_weight()
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), merged(x))
    assert coverage(model).matrices == 2
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    allocator = RankAllocator(model, config(tinit=0, tfinal=1), total_step=3).attach(optimizer)
    for _ in range(3):
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(allocator.ranks().values()) == 4


class Stacked(torch.nn.Module):
    """Three matrices in one tensor, of a kind that is not known."""

    def __init__(self):
        super().__init__()
        self.up = torch.nn.Linear(4, 4)
        self.own = torch.nn.Module()
        self.own.w = torch.nn.Parameter(torch.ones(3, 4, 4))

    def forward(self, x):
        return self.up(x) @ self.own.w.sum(0)


def test_a_tensor_of_several_matrices_is_named_and_can_be_excluded():
    """`all-linear` on a model whose experts nothing can adapt would leave most weights out, silently."""
    model = Stacked()
    with pytest.raises(UserError, match=r"own\.w.*3-D.*'own'"):
        inject_adalora(model, config())
    with pytest.raises(Unsupported, match=r"'own\.w'.*Module is of no kind of experts"):
        inject_adalora(model, config(target_modules=["w"]))
    assert names_of(model) == []
    inject_adalora(model, config(exclude_modules=["own"]))
    assert names_of(model) == ["up"]


def test_what_is_inside_an_excluded_module_is_left_out():
    """Else exclude_modules: [experts], or a whole layer's path, says nothing to the layers inside."""
    model = tiny.mixtral()
    inject_adalora(model, config(exclude_modules=["experts", "model.layers.1"]))
    assert names_of(model) == [f"model.layers.0.self_attn.{leaf}_proj" for leaf in "qkvo"]
    ids = torch.arange(10).view(1, 10)
    model(ids, labels=ids).loss.backward()
    assert all(layer.lora_B.grad.abs().sum() > 0 for _, layer in adapter_layers(model))
    named = inject_adalora(tiny.mixtral(), config(target_modules=["q_proj"]))
    assert len(names_of(named)) == 2  # who names layers has chosen


def test_expert_weights_count_in_the_coverage():
    """'100 % of the linear weights adapted' would be printed for a model whose experts are frozen."""
    model = inject_adalora(tiny.mixtral(), config(exclude_modules=["experts"]))
    attention = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16)
    experts = 2 * 4 * (48 * 16 + 16 * 24)
    found = coverage(model)
    assert found.adapted_weights == attention
    assert found.linear_weights == attention + experts + 64 * 16


def test_second_injection_is_refused(toy):
    """Adapters on adapters' own base would train nonsense."""
    inject_adalora(toy, config())
    with pytest.raises(UserError, match="already"):
        inject_adalora(toy, config())
    assert not any(isinstance(layer.base_layer, AdaLoraLayer) for _, layer in adapter_layers(toy))


def test_coverage_counted_by_hand():
    """The printed share is what a user judges a run by before paying for it."""
    model = inject_adalora(Toy(), config(target_modules=["up"], modules_to_save=["head"]))
    found = coverage(model)
    assert found.adapted_weights == 3 * 24 * 40
    assert found.linear_weights == 3 * 2 * 24 * 40 + 24 * 32
    assert found.adapter_parameters == 3 * 4 * (24 + 40 + 1)
    assert found.other_trainable == 24 * 32 + 32
    assert found.matrices == 3
    assert found.adapter_parameters + found.other_trainable == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    text = str(found)
    assert f"{3 * 24 * 40 / (3 * 2 * 24 * 40 + 24 * 32):.1%}" in text
    assert "780 adapter parameters" in text
    assert "800 in modules_to_save" in text


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.blocks.0.up", "blocks.0.up"),
        ("_orig_mod.blocks.0.up", "blocks.0.up"),
        ("module._orig_mod.blocks.0.up", "blocks.0.up"),
        ("_orig_mod.module.blocks.0.up.lora_A", "blocks.0.up.lora_A"),
        ("blocks.0._checkpoint_wrapped_module.up", "blocks.0.up"),
        ("blocks.0._orig_mod.up", "blocks.0.up"),
        ("blocks.0.up._orig_mod", "blocks.0.up"),
        ("blocks._fsdp_wrapped_module._checkpoint_wrapped_module.up", "blocks.up"),
        ("module", ""),
        ("", ""),
        ("blocks.module.up", "blocks.module.up"),
        ("modules.0.submodule.up", "modules.0.submodule.up"),
    ],
)
def test_plain_name_removes_wrappers_only(name, plain):
    """Names go into files and into comparisons over engines; a wrapper's part there loads nowhere."""
    assert plain_name(name) == plain


class WithModule(nn.Module):
    """A model with real submodules called `module`, chosen so that stripping the word would make two names equal."""

    def __init__(self):
        super().__init__()
        self.module = nn.ModuleDict({"up": nn.Linear(4, 4)})
        self.up = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"module": nn.ModuleDict({"up": nn.Linear(4, 4)}), "up": nn.Linear(4, 4)})

    def forward(self, x):
        return self.inner["up"](self.inner["module"]["up"](self.up(self.module["up"](x))))


class Wrapper(nn.Module):
    """DDP's name for what it wraps."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args, **kwargs):
        return self.module(*args, **kwargs)


@pytest.mark.parametrize("wrap", [lambda m: m, Wrapper, torch.compile, lambda m: Wrapper(torch.compile(m))])
def test_real_submodule_called_module_keeps_its_name(wrap):
    """Two layers under one name: one of them would get no mask, and neither could be saved or loaded."""
    model = inject_adalora(WithModule(), config(tinit=0, tfinal=1))
    expected = ["module.up", "up", "inner.module.up", "inner.up"]
    wrapped = wrap(model)
    assert names_of(wrapped) == expected
    allocator = RankAllocator(wrapped, config(tinit=0, tfinal=1), total_step=3)
    assert list(allocator.ranks()) == expected


def test_wrappers_inside_the_model_do_not_show_in_names(toy):
    """Regional compilation and activation checkpointing wrap single blocks."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    inject_adalora(toy, config())
    toy.blocks[0]["up"] = torch.compile(toy.blocks[0]["up"])
    toy.blocks[1]["down"] = checkpoint_wrapper(toy.blocks[1]["down"])
    assert names_of(toy) == ALL
    assert names_of(Wrapper(toy)) == ALL
