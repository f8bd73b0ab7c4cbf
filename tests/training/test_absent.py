"""Weights that a checkpoint does not hold: trained and saved, or refused, however the base is loaded."""

from __future__ import annotations

import json

import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

from adalora_scale.adalora.injection import injection_of
from adalora_scale.config import AdaLoraConfig, DataConfig, ModelConfig, RunConfig
from adalora_scale.engines.replicated import OneProcess
from adalora_scale.errors import UserError
from adalora_scale.export.peft_adalora import load_adapter, save_adapter
from adalora_scale.placing.model import load_model, place_model

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "pad_token_id": 0}
BERT = {**SIZES, "num_attention_heads": 2, "max_position_embeddings": 40}
LLAMA = hf.LlamaConfig(**BERT, num_key_value_heads=2)
BASES = {
    "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)), {"bert.pooler", "classifier"}),
    "distilbert": (
        lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=64, n_layers=1, n_heads=2, pad_token_id=0)
        ),
        {"pre_classifier", "classifier"},
    ),
    "deberta": (lambda: hf.DebertaV2Model(hf.DebertaV2Config(**BERT)), {"pooler", "classifier"}),
    "electra": (lambda: hf.ElectraForPreTraining(hf.ElectraConfig(**BERT, embedding_size=32)), {"classifier"}),
    "roberta": (lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**BERT)), {"classifier"}),
    "xlnet": (
        lambda: hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=64)),
        {"sequence_summary", "logits_proj"},
    ),
    "headless llama": (lambda: hf.LlamaModel(LLAMA), {"score"}),
}


def config_of(folder, task="sequence_classification", saved=None, target="all-linear", **model) -> RunConfig:
    return RunConfig(
        model=ModelConfig(model_name_or_path=str(folder), **model),
        data=DataConfig(train=""),
        adalora=AdaLoraConfig(init_r=2, target_r=1, modules_to_save=saved, target_modules=target),
        training={"output_dir": str(folder / "out")},
        task=task,
    )


def placed(config: RunConfig) -> torch.nn.Module:
    arguments = hf.TrainingArguments(output_dir=config.training["output_dir"], use_cpu=True, report_to=[])
    labels = ["no", "so", "yes"] if config.task != "causal_lm" else None
    return place_model(config, OneProcess(), arguments, label_names=labels)


@pytest.mark.parametrize("four_bits", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_new_layers_beside_the_head_are_trained_and_come_back(tmp_path, name, four_bits):
    """Else a pooler drawn at random is lost with the run, and the adapter loads over another one."""
    make, new = BASES[name]
    torch.manual_seed(0)
    make().save_pretrained(tmp_path)
    target = ["ff.layer_1"] if name == "xlnet" else "all-linear"  # its attention is in tensors of three dimensions
    options = {"load_in_4bit": True, "bnb_4bit_compute_dtype": "float32"} if four_bits else {}
    model = placed(config_of(tmp_path, target=target, **options)).eval()
    assert set(injection_of(model).config.modules_to_save) == new
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    save_adapter(model, tmp_path / "adapter")
    if four_bits:
        return
    torch.manual_seed(1)
    again = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    load_adapter(again, tmp_path / "adapter")
    tokens = torch.arange(1, 13).view(2, 6)
    torch.testing.assert_close(again.eval()(tokens).logits, model(tokens).logits)


def without(folder, *names: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k not in names}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}], ids=["whole", "streamed"])
@pytest.mark.parametrize("lost", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"])
def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path, lost, options):
    """Else a run trains over random numbers that nobody ever has again."""
    hf.LlamaForCausalLM(LLAMA).save_pretrained(tmp_path)
    without(tmp_path, lost)
    with pytest.raises(UserError, match=rf"lacks '{lost}'.*adalora\.modules_to_save"):
        placed(config_of(tmp_path, "causal_lm", **options))
    if not options:
        with pytest.raises(UserError, match=rf"lacks '{lost}'"):
            load_model(config_of(tmp_path, "causal_lm"))
        load_model(config_of(tmp_path, "causal_lm"), given=[lost])
    if lost == "lm_head.weight":
        model = placed(config_of(tmp_path, "causal_lm", saved=["lm_head"], **options))
        assert model.lm_head.weight.requires_grad and bool(model.lm_head.weight.abs().sum() > 0)


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}], ids=["whole", "streamed"])
def test_for_a_classifier_too(tmp_path, options):
    """A head is new by its nature; a layer of the base is not, nor what the user left out of modules_to_save."""
    hf.BertForMaskedLM(hf.BertConfig(**BERT)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"lacks 'bert\.pooler\.dense"):
        placed(config_of(tmp_path, saved=["classifier"], **options))
    without(tmp_path, "bert.embeddings.position_embeddings.weight")
    with pytest.raises(UserError, match=r"lacks 'bert\.embeddings\.position_embeddings\.weight'"):
        placed(config_of(tmp_path, **options))


def test_a_tied_head_does_not_lack(tmp_path):
    """Else every checkpoint with tied embeddings would be refused, or its head drawn anew."""
    shape = hf.LlamaConfig(**BERT, num_key_value_heads=2, tie_word_embeddings=True)
    hf.LlamaForCausalLM(shape).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"]
    for options in ({}, {"load_in_4bit": True}):
        model = placed(config_of(tmp_path, "causal_lm", saved=["embed_tokens"], **options))
        assert model.lm_head.weight is model.model.embed_tokens.weight
        stored = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
        torch.testing.assert_close(model.lm_head.weight.detach(), stored)


@pytest.mark.parametrize("options", [{}, {"load_in_4bit": True}], ids=["whole", "streamed"])
def test_what_peft_takes_for_a_head_is_trained_whole_though_the_checkpoint_has_it(tmp_path, options):
    """PEFT looks for every module whose name ends in classifier in the file, and ends in a KeyError otherwise."""
    shape = hf.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=64, n_layers=1, n_heads=2, num_labels=3)
    hf.DistilBertForSequenceClassification(shape).save_pretrained(tmp_path)
    model = placed(config_of(tmp_path, **options))
    assert set(injection_of(model).config.modules_to_save) == {"pre_classifier", "classifier"}
    save_adapter(model, tmp_path / "adapter")
    base = hf.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "adapter")
    saved = opened.get_base_model().pre_classifier.modules_to_save["default"].weight
    torch.testing.assert_close(saved.detach(), model.pre_classifier.weight.detach())
    with pytest.raises(UserError, match=r"leaves out 'pre_classifier'.*Add 'pre_classifier'"):
        placed(config_of(tmp_path, saved=["classifier"], **options))
