"""Adapters on embeddings and convolutions in files: ours, PEFT's plain LoRA, and merged."""

import copy
import json

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    T5Config,
    T5ForConditionalGeneration,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.base_checkpoint import BaseCheckpoint
from adalora_scale.export.continual import start_from_adapter
from adalora_scale.export.exporting import _refuse_other_function
from adalora_scale.export.from_checkpoint import adapter_folder
from adalora_scale.export.merge import plan_merge
from adalora_scale.export.peft_adalora import load_adapter, save_adapter, saved_values
from adalora_scale.export.peft_forms import write_peft_adalora, write_peft_lora
from adalora_scale.training.trainers import AdaLoraTrainer
from tests.adalora import tiny
from tests.export.adapters import IDS, assert_same_function, export, logits

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
TARGETS = ["words", "wide", "along", "pointwise", "out"]


def config(targets, **changes):
    return AdaLoraConfig(**{"init_r": 4, "target_r": 2, "lora_alpha": 8, "target_modules": targets, **changes})


def saved(model, folder, targets, *, masks=None):
    """Give `model` an adapter with random triplets and write it; `masks` as after the final allocation."""
    inject_adalora(model, config(targets))
    tiny.randomise(model)
    with torch.no_grad():
        for index, (_, layer) in enumerate(adapter_layers(model)):
            layer.lora_A[layer.adaptable.still_rows(layer.base_layer)] = 0
            if masks:
                layer.keep_mask = masks[index % len(masks)]
                layer.lora_E.mul_(torch.tensor(layer.keep_mask))
    save_adapter(model, folder)
    return model.eval()


@pytest.mark.parametrize("masks", [None, [[True, False, True, False], [False, True, True, True]]], ids=["all", "kept"])
def test_our_own_file_comes_back_exactly(tmp_path, masks):
    """Else a saved adapter of an embedding or a convolution is lost."""
    model, base = saved(tiny.mixed(), tmp_path, TARGETS, masks=masks), tiny.mixed()
    again = load_adapter(copy.deepcopy(base), tmp_path)
    for (name, layer), (_, twin) in zip(adapter_layers(model), adapter_layers(again), strict=True):
        kept = torch.tensor(layer.keep_mask or [True] * 4)
        assert torch.equal(layer.lora_A[:, kept], twin.lora_A) and torch.equal(layer.lora_B[:, kept], twin.lora_B), name
        assert torch.equal(layer.lora_E[kept], twin.lora_E)
    ids = IDS % 32
    torch.testing.assert_close(again(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert (model(ids) - base(ids)).abs().max() > 1e-2
    values = {id(parameter): value for parameter, value in saved_values(model, tmp_path)}
    for _, layer in adapter_layers(model):
        kept = torch.tensor(layer.keep_mask or [True] * 4)
        assert torch.equal(values[id(layer.lora_A)], layer.lora_A * kept)


@pytest.mark.refuses(
    "exports", form="peft-adalora", of="embeddings, convolutions", because="PEFT's AdaLoRA has linear layers only"
)
def test_peft_loads_the_plain_lora_form(tmp_path):
    """Else what a server or PEFT loads is not what was trained."""
    model = saved(tiny.mixed(), tmp_path / "run", TARGETS)
    (tmp_path / "lora").mkdir()
    adapter = AdapterFile(tmp_path / "run")
    write_peft_lora(adapter, tmp_path / "lora", base=None)
    loaded = peft.PeftModel.from_pretrained(tiny.mixed(), tmp_path / "lora").eval()
    ids = IDS % 32
    torch.testing.assert_close(loaded(ids), model(ids), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loaded.merge_and_unload()(ids), model(ids), rtol=1e-4, atol=1e-4)
    shapes = {
        key: tuple(tensor.shape) for key, tensor in load_file(tmp_path / "lora/adapter_model.safetensors").items()
    }
    assert shapes["base_model.model.wide.lora_A.weight"] == (4, 1, 3, 2)
    assert shapes["base_model.model.words.lora_embedding_A"] == (4, 32)
    # …and the plain LoRA is read back as what it was made of.
    again = AdapterFile(tmp_path / "lora")
    for name, shape in adapter.modules.items():
        assert again.modules[name].form == shape.form
        one, other = adapter.update(name), again.update(name)
        torch.testing.assert_close(
            one.delta(0, shape.out_features, transposed=False), other.delta(0, shape.out_features, transposed=False)
        )
    with pytest.raises(Unsupported, match="peft-lora"):
        write_peft_adalora(adapter, tmp_path / "lora", base=None)


@pytest.mark.parametrize("form", ["run", "lora"])
def test_a_run_goes_on_from_such_an_adapter(tmp_path, form):
    """Else model.adapter_path loses embeddings and convolutions."""
    model = saved(tiny.mixed(), tmp_path / "run", TARGETS)
    (tmp_path / "lora").mkdir()
    write_peft_lora(AdapterFile(tmp_path / "run"), tmp_path / "lora", base=None)
    again = inject_adalora(tiny.mixed(), config(TARGETS, init_r=6))
    start_from_adapter(again, tmp_path / form)
    torch.testing.assert_close(again.eval()(IDS % 32), model(IDS % 32), rtol=1e-4, atol=1e-4)
    assert again.words.lora_A[0].abs().max() < 1e-6  # the padding token's


def gemma():
    torch.manual_seed(0)
    options = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    return Gemma3ForCausalLM(options)


@pytest.mark.shows("exports", form=("peft-lora", "merged"), of="embeddings, convolutions")
@pytest.mark.parametrize(
    ("make", "targets", "embedding"),
    [
        (tiny.gpt2, ["wte", "wpe", "c_attn"], "transformer.wte"),
        (gemma, ["embed_tokens", "q_proj"], "model.embed_tokens"),
    ],
)
def test_an_adapted_embedding_is_exported_and_the_tied_head_stays(tmp_path, make, targets, embedding, capsys):
    """Else the merge changes the output head in silence, or drops the embedding's update or scale."""
    make().save_pretrained(tmp_path / "base")
    load = AutoModelForCausalLM.from_pretrained
    base = load(tmp_path / "base").eval()
    model = saved(load(tmp_path / "base"), tmp_path / "run", targets)
    expected = logits(model)
    report = export(
        tmp_path / "run", tmp_path / "out", "--format", "merged", "--base", tmp_path / "base", capsys=capsys
    )
    out = load(tmp_path / "out").eval()
    assert_same_function(out, expected, base, tolerance=1e-4)
    assert torch.equal(out.lm_head.weight, base.lm_head.weight)
    assert not torch.equal(out.get_submodule(embedding).weight, base.get_submodule(embedding).weight)
    assert any("no longer tied" in note for note in report["notes"])
    assert report["fidelity"]["relative"] < 1e-4
    report = export(
        tmp_path / "run", tmp_path / "lora", "--format", "peft-lora", "--base", tmp_path / "base", capsys=capsys
    )
    assert report["fidelity"]["relative"] < 1e-4
    assert_same_function(
        peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "lora"), expected, base, 1e-4
    )


def test_a_tie_that_is_not_the_heads_is_refused(tmp_path):
    """Else a merged encoder's embedding changes the decoder's."""
    torch.manual_seed(0)
    options = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(options).save_pretrained(tmp_path / "base")
    model = T5ForConditionalGeneration.from_pretrained(tmp_path / "base")
    saved(model, tmp_path / "run", ["encoder.embed_tokens"])
    base = BaseCheckpoint(tmp_path / "base", task=None, num_labels=None)
    with pytest.raises(Unsupported, match="shares its weight"):
        plan_merge(AdapterFile(tmp_path / "run"), base)


@pytest.mark.shows("exports", form=("peft-lora", "merged"), of="embeddings, convolutions")
def test_a_vision_models_convolution_is_exported(tmp_path, capsys):
    """Else only text models can adapt a convolution."""
    torch.manual_seed(0)
    options = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=4,
        num_labels=3,
    )  # fmt: skip
    ViTForImageClassification(options).save_pretrained(tmp_path / "base")
    load = ViTForImageClassification.from_pretrained

    @torch.no_grad()
    def scores(model):
        return model.eval()(pixel_values=IMAGES).logits

    model = saved(load(tmp_path / "base"), tmp_path / "run", ["projection"])
    base, expected = scores(load(tmp_path / "base")), scores(model)
    assert (expected - base).abs().max() > 1e-3
    edited = json.loads((tmp_path / "run/adapter_config.json").read_text())
    assert edited["task_type"] is None
    for form in ("merged", "peft-lora"):
        report = export(tmp_path / "run", tmp_path / form, "--format", form, "--base", tmp_path / "base", capsys=capsys)
        assert "pixel_values" in report["fidelity_text"]
    torch.testing.assert_close(scores(load(tmp_path / "merged")), expected, rtol=1e-5, atol=1e-5)
    with_peft = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "peft-lora")
    torch.testing.assert_close(scores(with_peft), expected, rtol=1e-5, atol=1e-5)

    # PEFT's own convolution would have another dilation than the base's.
    checkpoint = BaseCheckpoint(tmp_path / "base", task=None, num_labels=None)
    _refuse_other_function(AdapterFile(tmp_path / "run"), checkpoint)
    checkpoint.model.get_submodule("vit.embeddings.patch_embeddings.projection").dilation = (1, 2)
    with pytest.raises(Unsupported, match=r"dilation=\(1, 2\)"):
        _refuse_other_function(AdapterFile(tmp_path / "run"), checkpoint)


def test_a_checkpoint_says_how_its_adapter_is_held_in_files(tmp_path):
    """Else an embedding of a run that ended badly is exported as a linear layer, which nobody can load."""
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 60, (24, 12), generator=generator).tolist()]
    options = TrainingArguments(
        str(tmp_path), max_steps=6, save_strategy="steps", save_steps=6, per_device_train_batch_size=4, use_cpu=True,
        report_to=[], learning_rate=1e-2, disable_tqdm=True,
    )  # fmt: skip
    adalora = config(["wte", "c_attn"], tinit=1, tfinal=2, deltaT=1)
    AdaLoraTrainer(tiny.gpt2(), args=options, train_dataset=rows, adalora_config=adalora).train()
    final = AdapterFile(tmp_path)
    with adapter_folder(tmp_path / "checkpoint-6") as folder:
        made = AdapterFile(folder)
        assert made.modules == final.modules
        assert made.modules["transformer.wte"].form.lora == ("lora_embedding_A", "lora_embedding_B")
        for name in final.modules:
            assert torch.equal(made.update(name).a, final.update(name).a)
