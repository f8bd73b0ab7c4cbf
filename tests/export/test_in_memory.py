"""Adapters in memory: off and on, merged and back, out; what merges here has the exporter's bits."""

import copy
import pickle

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import adalora_scale
from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.in_memory import disable_adapters, merge_adapters, merge_and_unload, unload, unmerge_adapters
from adalora_scale.export.inspection import inspect_folder
from adalora_scale.export.peft_adalora import load_adapter, save_adapter
from adalora_scale.export.switching import adapter_names, delete_adapter, set_adapter
from adalora_scale.quantization.linear import quantize_model
from adalora_scale.quantization.spec import QuantSpec
from tests.export.adapters import IDS, base_and_run, load, trained

SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def base_folder(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("kind", ["stories260k", "gpt2"])
def test_off_merged_and_out_are_the_base_and_the_exported_model(kind, tmp_path, request, capsys):
    """Else what a notebook shows is not what is served, or `back` is only nearly the base."""
    base, run = base_and_run(kind, tmp_path, request)
    assert main(["export", str(run), str(tmp_path / "merged"), "--format", "merged", "--base", str(base)]) == 0
    plain, exported = load(base, kind), load(tmp_path / "merged", kind)
    model = load_adapter(load(base, kind), run)
    beside, before = logits(model), weights(model)
    assert not torch.equal(beside, logits(plain))

    with disable_adapters(model) as off:
        assert off is model and torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model), beside)

    merge_adapters(model)
    assert torch.equal(logits(model), logits(exported))
    with pytest.raises(UserError, match="merged"), disable_adapters(model):
        pass
    with pytest.raises(UserError, match="merged"):
        merge_adapters(model)
    unmerge_adapters(model)
    assert torch.equal(logits(model), beside) and equal(weights(model), before)
    with pytest.raises(UserError, match="not merged"):
        unmerge_adapters(model)

    merged = merge_and_unload(load_adapter(load(base, kind), run))
    assert equal(weights(merged), weights(exported))
    merged.save_pretrained(tmp_path / "again")  # transformers' own again
    assert torch.equal(logits(load(tmp_path / "again", kind)), logits(exported))
    assert equal(weights(unload(model)), weights(plain))
    with pytest.raises(UserError, match="no AdaLoRA layers"):
        unload(model)


def test_a_tied_embedding_parts_from_its_head_and_comes_back(tmp_path):
    """Else the head gets the embedding's update, in a model that the exporter writes otherwise."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=True)).save_pretrained(tmp_path / "base")
    trained(tmp_path / "base", "gpt2", tmp_path / "run", target_modules=["embed_tokens", "q_proj"])
    main(
        [
            "export",
            str(tmp_path / "run"),
            str(tmp_path / "merged"),
            "--format",
            "merged",
            "--base",
            str(tmp_path / "base"),
        ]
    )
    model = load_adapter(load(tmp_path / "base", "gpt2"), tmp_path / "run")
    beside, head = logits(model), model.lm_head.weight
    merge_adapters(model)
    assert not model.config.tie_word_embeddings and model.lm_head.weight is head
    assert torch.equal(logits(model), logits(load(tmp_path / "merged", "gpt2")))
    unmerge_adapters(model)
    assert model.config.tie_word_embeddings and model.get_input_embeddings().weight is head
    assert torch.equal(logits(model), beside)


def test_a_sum_that_does_not_fit_leaves_the_base_as_it_was(base_folder, tmp_path):
    """Half a merge would be a model that nobody trained."""
    trained(base_folder, "gpt2", tmp_path / "run")
    model = load_adapter(load(base_folder, "gpt2").to(torch.float16), tmp_path / "run")
    last = list(adapter_layers(model))[-1][1]
    last.lora_E.data.fill_(1e7)
    last.lora_B.data.fill_(1.0)
    before = weights(model)
    with pytest.raises(UserError, match="does not fit"):
        merge_adapters(model)
    assert equal(weights(model), before)
    assert not any(layer.bypassed for _, layer in adapter_layers(model))


def test_what_cannot_be_merged_or_taken_out_is_refused_by_name(base_folder, tmp_path):
    """Each would leave a model that is neither the base nor the adapter's."""
    trained(base_folder, "gpt2", tmp_path / "run")
    quantised = load(base_folder, "gpt2")
    quantize_model(quantised, QuantSpec())
    inject_adalora(quantised, AdaLoraConfig(init_r=2, target_r=1))
    with pytest.raises(Unsupported, match=r"in 4 bits.*--dequantise"):
        merge_adapters(quantised)
    with disable_adapters(quantised):
        pass
    headed = inject_adalora(load(base_folder, "gpt2"), AdaLoraConfig(init_r=2, target_r=1, modules_to_save=["lm_head"]))
    for call in (unload, lambda model: disable_adapters(model).__enter__()):
        with pytest.raises(Unsupported, match="'lm_head' was trained in full"):
            call(headed)
    config = AdaLoraConfig(init_r=2, target_r=1, tinit=1, tfinal=1, deltaT=1)
    model = inject_adalora(load(base_folder, "gpt2"), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    allocator = adalora_scale.RankAllocator(model, config, total_step=4).attach(optimizer)
    for call in (
        merge_adapters,
        merge_and_unload,
        unload,
        lambda m: load_adapter(m, tmp_path / "run", adapter_name="b"),
    ):
        with pytest.raises(UserError, match=r"training is running \(step 0 of 4\)"):
            call(model)
    copy.deepcopy(model)
    pickle.dumps(model)
    for _ in range(4):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert allocator.frozen
    merge_and_unload(model)


def test_two_adapters_take_turns(base_folder, tmp_path):
    """PEFT's users expect it; an adapter must be after a turn what it was before, and a saved one itself alone."""
    trained(base_folder, "gpt2", tmp_path / "a", target_modules=["q_proj", "v_proj"])
    trained(base_folder, "gpt2", tmp_path / "b", target_modules=["v_proj", "up_proj"], lora_alpha=16)
    alone = {name: logits(load_adapter(load(base_folder, "gpt2"), tmp_path / name)) for name in "ab"}
    assert not torch.equal(alone["a"], alone["b"])
    model = load_adapter(load(base_folder, "gpt2"), tmp_path / "a", adapter_name="a")
    load_adapter(model, tmp_path / "b", adapter_name="b")
    assert adapter_names(model) == ["a", "b"] and torch.equal(logits(model), alone["a"])
    set_adapter(model, "b")
    assert adapter_names(model) == ["b", "a"] and torch.equal(logits(model), alone["b"])
    save_adapter(model, tmp_path / "again")
    found, first = inspect_folder(tmp_path / "again"), inspect_folder(tmp_path / "b")
    assert found["ranks"] == first["ranks"]
    merge_adapters(model)
    with pytest.raises(UserError, match="merged"):
        set_adapter(model, "a")
    unmerge_adapters(model)
    with pytest.raises(UserError, match="active"):
        delete_adapter(model, "b")
    with pytest.raises(UserError, match="there is no adapter 'c'; the model has b, a"):
        set_adapter(model, "c")
    with pytest.raises(UserError, match="already has an adapter 'a'"):
        load_adapter(model, tmp_path / "b", adapter_name="a")
    (tmp_path / "broken").mkdir()
    with pytest.raises(UserError, match=r"no adapter_config\.json"):
        load_adapter(model, tmp_path / "broken", adapter_name="c")
    assert adapter_names(model) == ["b", "a"] and torch.equal(logits(model), alone["b"])
    set_adapter(model, "a")
    delete_adapter(model, "b")
    assert adapter_names(model) == ["a"] and torch.equal(logits(model), alone["a"])


def test_a_second_adapter_beside_modules_trained_in_full_is_refused(base_folder, tmp_path):
    """Its head would stay in the model under the other adapter."""
    trained(base_folder, "gpt2", tmp_path / "plain")
    trained(base_folder, "gpt2", tmp_path / "headed", modules_to_save=["lm_head"])
    model = load_adapter(load(base_folder, "gpt2"), tmp_path / "plain")
    before, ids = logits(model), weights(model)
    with pytest.raises(Unsupported, match="trained in full"):
        load_adapter(model, tmp_path / "headed", adapter_name="b")
    assert adapter_names(model) == ["default"] and torch.equal(logits(model), before) and equal(weights(model), ids)


def test_a_sharded_model_is_refused_with_the_way(base_folder):
    """A rank that merged its piece alone would leave the others' weights behind."""
    from torch.distributed.fsdp import fully_shard
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        model = inject_adalora(load(base_folder, "gpt2"), AdaLoraConfig(init_r=2, target_r=1))
        fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (2,)))
        for call in (merge_adapters, unload, lambda model: disable_adapters(model).__enter__()):
            with pytest.raises(Unsupported, match=r"is sharded over ranks.*adalora-scale export"):
                call(model)
    finally:
        torch.distributed.destroy_process_group()


def test_the_adapters_of_a_plain_module_merge_too():
    """Nothing here is transformers'."""
    torch.manual_seed(0)
    model = inject_adalora(nn.Sequential(nn.Linear(4, 4), nn.Conv1d(4, 3, 2)), AdaLoraConfig(
        init_r=2, target_r=1, target_modules=["0", "1"], init_weights="adalora"
    ))  # fmt: skip
    for _, layer in adapter_layers(model):
        layer.lora_E.data.fill_(0.5)
    x = torch.randn(4, 4)
    beside = model(x)
    assert torch.allclose(merge_and_unload(model)(x), beside, atol=1e-6)
    assert not list(adapter_layers(model))
