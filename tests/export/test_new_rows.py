"""An adapter with more rows in embedding and head than its base: the same function here, merged and in PEFT."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import AdaLoraConfig, ModelConfig, RunConfig
from adalora_scale.config.options import DataConfig
from adalora_scale.errors import Unsupported
from adalora_scale.export.peft_adalora import load_adapter, save_adapter
from adalora_scale.placing import streaming
from adalora_scale.tasks.vocabulary import added_rows, grow, grow_in_memory, grown_modules
from tests.export.adapters import shaken

OLD, NEW = 60, 128
IDS = torch.arange(40, 88).view(2, 24)  # beyond the base's rows, too
PARTS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def make_base(folder, *, tied=False, dtype=torch.float32):
    torch.manual_seed(0)
    shape = LlamaConfig(vocab_size=OLD, num_key_value_heads=2, tie_word_embeddings=tied, **PARTS)
    LlamaForCausalLM(shape).to(dtype).save_pretrained(folder)
    return folder


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def trained(base):
    model = loaded(base)
    grown = grow_in_memory(model, NEW, seed=3)
    inject_adalora(model, AdaLoraConfig(init_r=4, target_r=2, modules_to_save=grown_modules(grown)))
    return shaken(model)


@pytest.mark.shows("exports", form=("peft-adalora", "peft-lora", "merged"), of="new tokens")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_every_form_carries_the_rows(tmp_path, tied):
    """Else the adapter of a run with new tokens opens nowhere, or with rows that nobody trained."""
    base = make_base(tmp_path / "base", tied=tied)
    model = trained(base)
    wanted = logits(model)
    save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(logits(load_adapter(loaded(base), tmp_path / "adapter")), wanted)
    for form in ("peft-adalora", "peft-lora", "merged"):
        out = tmp_path / form
        assert main(["export", str(tmp_path / "adapter"), str(out), "--format", form, "--base", str(base)]) == 0
        report = json.loads((out / "export.json").read_text())
        assert report["vocabulary"] == NEW and report["fidelity"]["largest_difference"] < 1e-4
        if form == "merged":
            opened = loaded(out)
            assert opened.config.vocab_size == NEW and opened.config.tie_word_embeddings == tied
        else:
            resized = loaded(base)
            resized.resize_token_embeddings(NEW)
            opened = PeftModel.from_pretrained(resized, out)
            assert f"resize_token_embeddings({NEW})" in "".join(report["notes"])
        torch.testing.assert_close(logits(opened), wanted, rtol=1e-4, atol=1e-4)


def test_a_head_without_the_rows_is_refused(tmp_path, capsys):
    """Others' adapters may hold the embedding alone: the head would have fewer rows than the config says."""
    base = make_base(tmp_path / "base")
    save_adapter(trained(base), tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "lm_head" not in name}, file)
    assert main(["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--format", "merged"]) == 2
    assert "no rows of 'lm_head.weight'" in capsys.readouterr().err


def test_new_rows_are_drawn_as_transformers_draws_them():
    """Their mean is the old rows', their covariance 1e-9 of it; else new tokens begin as noise."""
    torch.manual_seed(0)
    old = torch.randn(5000, 4, dtype=torch.float64) @ torch.randn(4, 4, dtype=torch.float64) + 3
    new = added_rows(lambda a, b: old[a:b], 5000, 20_000, seed=0)
    torch.testing.assert_close(new.mean(0), old.mean(0), rtol=1e-5, atol=0)
    torch.testing.assert_close(new.T.cov() * 1e9, old.T.cov(), rtol=0.05, atol=0.05 * old.T.cov().abs().max().item())
    assert torch.equal(new, added_rows(lambda a, b: old[a:b], 5000, 20_000, seed=0))
    assert not torch.equal(new, added_rows(lambda a, b: old[a:b], 5000, 20_000, seed=1))
    column = added_rows(lambda a, b: old[a:b, 0], 5000, 3, seed=0)  # a head's bias
    assert column.shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_streamed_base_gets_the_rows_of_one_in_memory(tmp_path, tied, dtype):
    """Else engines that stream begin with other weights than one process."""
    base = make_base(tmp_path / "base", tied=tied, dtype=dtype)
    config = RunConfig(
        model=ModelConfig(model_name_or_path=str(base)),
        data=DataConfig(train=""),
        training={"output_dir": "out", "seed": 3},
    )
    started = streaming.begin(config, device=torch.device("cpu"), rows=NEW)
    streamed = streaming.load_whole(started)
    whole = loaded(base)
    state = torch.get_rng_state()
    assert grow_in_memory(whole, NEW, seed=3) == started.grown
    assert torch.equal(torch.get_rng_state(), state), "adapters are drawn after it"
    expected = whole.state_dict()
    assert streamed.state_dict().keys() == expected.keys()
    assert all(value.equal(expected[name]) for name, value in streamed.state_dict().items())
    assert (streamed.lm_head.weight is streamed.model.embed_tokens.weight) == tied
    assert torch.equal(expected["lm_head.weight"][:OLD], loaded(base).lm_head.weight)


def test_another_table_of_tokens_is_refused():
    """transformers enlarges one table; a token beyond the other ends in an IndexError."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=OLD, n_embd=16, n_layer=1, n_head=2))
    model.more = torch.nn.Embedding(OLD, 4)
    with pytest.raises(Unsupported, match="'more' of GPT2LMHeadModel is another table of tokens"):
        grow(model, NEW)
