"""A head tied to its embedding: trained in full or adapted, under either name, it computes the same everywhere."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import UserError
from adalora_scale.export.peft_adalora import load_adapter, save_adapter
from adalora_scale.export.tied import tied_names
from tests.export.adapters import shaken

CONFIG = AdaLoraConfig(init_r=4, target_r=2)
IDS = torch.arange(1, 25).view(2, 12)


@pytest.fixture
def base(tmp_path):
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True}
    LlamaForCausalLM(LlamaConfig(**shape, **heads)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


def trained(base, **options):
    model = inject_adalora(loaded(base), CONFIG.replace(**options))
    return shaken(model)


@pytest.mark.parametrize("saved", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head"]], ids=str)
def test_trained_in_full_under_any_name(tmp_path, base, saved):
    """Else an adapter does not load over its own base, or in PEFT the head keeps the base's weight."""
    model = trained(base, modules_to_save=saved)
    wanted = logits(model)
    save_adapter(model, tmp_path / "adapter")
    names = {key.removeprefix("base_model.model.") for key in load_file(tmp_path / "adapter/adapter_model.safetensors")}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= names
    again = load_adapter(loaded(base), tmp_path / "adapter")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    torch.testing.assert_close(logits(again), wanted)
    for form in ("peft-adalora", "peft-lora", "merged"):
        out = tmp_path / form
        assert main(["export", str(tmp_path / "adapter"), str(out), "--format", form, "--base", str(base)]) == 0
        opened = loaded(out) if form == "merged" else PeftModel.from_pretrained(loaded(base), out)
        torch.testing.assert_close(logits(opened), wanted, rtol=1e-4, atol=1e-4)
    assert loaded(tmp_path / "merged").config.tie_word_embeddings
    assert tied_names(model) == {"model.embed_tokens.weight": ["lm_head.weight"]}


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_of_the_two(tmp_path, base, target):
    """It is that module's alone, here, in PEFT and merged."""
    model = trained(base, target_modules=["q_proj", target])
    wanted = logits(model)
    save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(load_adapter(loaded(base), tmp_path / "adapter")), wanted)
    for form in ("peft-lora", "merged"):
        out = tmp_path / form
        assert main(["export", str(tmp_path / "adapter"), str(out), "--format", form, "--base", str(base)]) == 0
        opened = loaded(out) if form == "merged" else PeftModel.from_pretrained(loaded(base), out)
        torch.testing.assert_close(logits(opened), wanted, rtol=1e-4, atol=1e-4)


def test_an_adapter_on_one_and_the_other_trained_in_full_is_refused(base):
    """The one weight would be frozen for the adapter and trained for the head."""
    with pytest.raises(UserError, match=r"'model\.embed_tokens'.*shares a weight with one that is named there"):
        trained(base, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])


@pytest.mark.parametrize("alone", [True, False], ids=["one of the two", "both, different"])
def test_what_peft_parted_stays_parted(tmp_path, base, alone):
    """PEFT trains copies: an adapter of its own may hold two weights, or one over which the other is the base's."""
    model = trained(base, modules_to_save=["embed_tokens"])
    save_adapter(model, tmp_path / "adapter")
    file = tmp_path / "adapter/adapter_model.safetensors"
    weights = load_file(file)
    head = "base_model.model.lm_head.weight"
    kept = {key: value for key, value in weights.items() if key != head}
    other = {} if alone else {head: weights[head] + 1}
    from safetensors.torch import save_file

    save_file(kept | other, file)  # without our record, as PEFT writes it
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    config["modules_to_save"] = ["embed_tokens"] if alone else ["embed_tokens", "lm_head"]
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(config))
    wanted = logits(PeftModel.from_pretrained(loaded(base), tmp_path / "adapter"))
    torch.testing.assert_close(logits(load_adapter(loaded(base), tmp_path / "adapter")), wanted, rtol=1e-4, atol=1e-4)
    out = tmp_path / "merged"
    code = main(["export", str(tmp_path / "adapter"), str(out), "--format", "merged", "--base", str(base)])
    assert code == 0
    torch.testing.assert_close(logits(loaded(out)), wanted, rtol=1e-4, atol=1e-4)
    assert not loaded(out).config.tie_word_embeddings
