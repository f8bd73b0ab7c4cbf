"""Adapters of PEFT that are more than W + s · B A, or of a base that is not the one at hand; a fidelity that fails."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export import fidelity, merge
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.adapter_keys import require_plain
from adalora_scale.export.continual import start_from_adapter
from tests.export.adapters import edit_json, export, one_error_line

peft = pytest.importorskip("peft")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SHAPE = dict(
    vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
)  # fmt: skip
QUERY = ["q_proj", "v_proj"]


def base(folder, dtype=torch.float32, **changes):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE | changes)).to(dtype).save_pretrained(folder)
    return folder


def foreign(folder, base_folder, *, size=0.05, config=peft.LoraConfig, factory=AutoModelForCausalLM, **options):
    """An adapter that PEFT made, with every trained value moved by `size`."""
    torch.manual_seed(1)
    model = factory.from_pretrained(base_folder, dtype=torch.float32)
    model = peft.get_peft_model(model, config(**{"target_modules": QUERY, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * size)
    model.save_pretrained(folder)
    return folder


REFUSED = {
    "pissa": {"init_lora_weights": "pissa"},
    "pissa_niter": {"init_lora_weights": "pissa_niter_2"},
    "olora": {"init_lora_weights": "olora"},
    "dora": {"use_dora": True},
    "alora": {"alora_invocation_tokens": [5, 6]},
    "tokens": {"trainable_token_indices": [5, 6]},
    "parameters": {"target_parameters": ["mlp.gate_proj.weight"]},
    "lora_bias": {"lora_bias": True},
    "replication": {"layer_replication": [(0, 2), (1, 2)]},
}


@pytest.mark.parametrize("name", REFUSED)
def test_peft_adapters_that_are_more_than_a_product_are_refused_by_key(tmp_path, capsys, name):
    """Else their function is W + s · B A of the wrong base, in silence."""
    bias = {"factory": _BiasedLlama} if name == "lora_bias" else {}
    foreign(tmp_path / "adapter", base(tmp_path / "base"), **REFUSED[name], **bias)
    key = next(iter(REFUSED[name]))
    command = ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--format", "merged"]
    assert key in one_error_line(capsys, lambda: main(command))
    assert not (tmp_path / "out").exists()


class _BiasedLlama(AutoModelForCausalLM):
    @classmethod
    def from_pretrained(cls, folder, **options):
        config = LlamaConfig.from_pretrained(folder, attention_bias=True)
        return LlamaForCausalLM.from_pretrained(folder, config=config, **options)


@pytest.mark.parametrize("method", ["LORA", "ADALORA"])
@pytest.mark.parametrize(
    ("key", "value"),
    [("init_lora_weights", "lora_ga"), ("init_lora_weights", "corda"), ("init_lora_weights", "loftq"),
     ("init_lora_weights", "from_2027"), ("future_scale", 2.0), ("future_mode", "x"), ("bias", "all")],
)  # fmt: skip
def test_values_that_are_not_understood_are_refused_by_key(tmp_path, key, value, method):
    """A key that a later PEFT brings may change the function; nobody here can know."""
    with pytest.raises(Unsupported, match=f"{key}={value}"):
        require_plain({"peft_type": method, "r": 4, "lora_alpha": 8, key: value}, tmp_path)


@pytest.mark.parametrize("config", [peft.LoraConfig(), peft.AdaLoraConfig(total_step=10)], ids=["lora", "adalora"])
def test_every_default_of_the_installed_peft_is_understood(tmp_path, config):
    """Else a new PEFT's adapters are all refused for a key that says nothing."""
    require_plain({key: getattr(value, "value", value) for key, value in config.to_dict().items()}, tmp_path)
    harmless = {
        "megatron_core": "mine",
        "qalora_group_size": 3,
        "future": None,
        "later": {},
        "init_lora_weights": "eva",
    }
    require_plain({"peft_type": "LORA", **harmless}, tmp_path)


@pytest.mark.parametrize(
    "options",
    [{"init_lora_weights": "orthogonal", "exclude_modules": ["layers.1.self_attn.q_proj"]},
     {"init_lora_weights": "mica", "layers_to_transform": [1], "use_rslora": True}],
    ids=["orthogonal", "mica"],
)  # fmt: skip
def test_adapters_whose_function_is_in_their_tensors_merge_into_it(tmp_path, capsys, options):
    """A key that only says how an adapter came about must not lose it, and must not change it."""
    foreign(tmp_path / "adapter", base(tmp_path / "base"), r=4, lora_alpha=8, **options)
    report = export(
        tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base", "--format", "merged", capsys=capsys
    )
    assert report["fidelity"]["unexplained"] < 1e-5 and report["fidelity"]["adapter_effect"] > 1e-3


def test_a_converted_pissa_adapter_is_the_function_that_peft_had(tmp_path, capsys):
    """The way out that the refusal names must be one."""
    base(tmp_path / "base")
    torch.manual_seed(1)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(plain, peft.LoraConfig(target_modules=QUERY, init_lora_weights="pissa", r=4))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    model.peft_config["default"].init_lora_weights = "pissa"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.arange(20)[None]
    expected = model(input_ids=ids).logits
    model.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    export(tmp_path / "plain", tmp_path / "out", "--base", tmp_path / "base", "--format", "merged", capsys=capsys)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (merged(input_ids=ids).logits - expected).abs().max() < 1e-4


HEADS = {
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
}


@pytest.mark.parametrize("name", HEADS)
def test_the_base_layer_beside_a_head_is_accepted_when_it_is_the_base(tmp_path, capsys, name):
    """PEFT saves it without being asked; the adapter is plain LoRA all the same."""
    foreign(tmp_path / "adapter", base(tmp_path / "base"), **HEADS[name])
    assert AdapterFile(tmp_path / "adapter").copies
    for form in ("merged", "peft-lora"):
        out = tmp_path / form
        report = export(tmp_path / "adapter", out, "--base", tmp_path / "base", "--format", form, capsys=capsys)
        assert report["fidelity"]["unexplained"] < 1e-5
    assert not any("base_layer" in key for key in load_file(tmp_path / "peft-lora" / WEIGHTS))


@pytest.mark.parametrize("form", ["merged", "peft-lora"])
def test_the_base_layer_beside_a_head_is_refused_by_name_when_it_is_another(tmp_path, capsys, form):
    """Its update stands on other weights: the sum would be a model that nobody trained."""
    foreign(tmp_path / "adapter", base(tmp_path / "base"), **HEADS["head"])
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    tensors["base_model.model.lm_head.base_layer.weight"][3, 4] += 0.5
    save_file(tensors, tmp_path / "adapter" / WEIGHTS)
    command = ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--format", form]
    assert "'lm_head.weight'" in one_error_line(capsys, lambda: main(command))


def test_the_base_layer_of_a_base_that_is_not_at_hand_stays_in_the_file(tmp_path, capsys):
    """Nobody could compare it, and PEFT still loads it."""
    foreign(tmp_path / "adapter", base(tmp_path / "base"), **HEADS["head"])
    edit_json(tmp_path / "adapter" / CONFIG, base_model_name_or_path="/nowhere/base")
    export(tmp_path / "adapter", tmp_path / "out", "--format", "peft-lora", capsys=capsys)
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / "out" / WEIGHTS)


def test_a_rounded_copy_of_the_base_layer_is_the_base(tmp_path):
    """A run in bfloat16 on a float32 base saves the base rounded."""
    foreign(tmp_path / "adapter", base(tmp_path / "base"), **HEADS["head"])
    adapter = AdapterFile(tmp_path / "adapter")
    weight = load_file(tmp_path / "base" / "model.safetensors")["lm_head.weight"]
    adapter.require_own_copies(lambda name: {"lm_head.weight": weight.double()}[name])
    assert not adapter.copies
    with pytest.raises(UserError, match="cannot be compared"):
        AdapterFile(tmp_path / "adapter").require_own_copies(lambda name: None)


@pytest.mark.parametrize(
    ("dtype", "size", "wrong"),
    [(torch.bfloat16, 0.05, 0.0), (torch.bfloat16, 0.01, 0.0), (torch.float32, 0.01, 1.0), (torch.bfloat16, 0.01, 0.5)],
)
def test_a_merged_model_that_lost_part_of_its_adapter_fails_and_is_kept_aside(
    tmp_path, capsys, monkeypatch, dtype, size, wrong
):
    """A check that a lost adapter passes is none; one that rounding fails is one too many."""
    foreign(tmp_path / "adapter", base(tmp_path / "base", dtype), size=size, lora_alpha=16)
    delta = merge.added
    monkeypatch.setattr(merge, "added", lambda weight, update, *rest: delta(weight, update * (1 - wrong), *rest))
    command = ["export", tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base", "--format", "merged"]
    for attempt in ("out.unfaithful", "out.unfaithful-2") if wrong else ("out",):
        code = main([*map(str, command), "--json"])
        report = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert code == (1 if wrong else 0), report["fidelity_text"]
        kept = tmp_path / attempt
        assert (kept / "model.safetensors").exists() and (kept / "export.json").exists()
        assert os.path.exists(tmp_path / "out") != bool(wrong)
        assert str(kept) in report["what"]


def test_a_model_with_an_encoder_is_measured(tmp_path, capsys):
    """T5's forward wants tokens for its decoder; without them the export ended in a traceback."""
    torch.manual_seed(0)
    shape = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    T5ForConditionalGeneration(shape).save_pretrained(tmp_path / "base")
    foreign(tmp_path / "adapter", tmp_path / "base", factory=T5ForConditionalGeneration, target_modules=["q", "v"])
    report = export(
        tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base", "--format", "merged", capsys=capsys
    )
    assert report["fidelity"]["unexplained"] < 1e-5


def test_a_base_that_does_not_run_on_text_is_said_to_be_unmeasured(tmp_path, capsys, monkeypatch):
    """The samples are text; what a model wants beside it nobody can guess, and the merge is right without."""
    foreign(tmp_path / "adapter", base(tmp_path / "base"))

    def refuses(model, batches):
        raise ValueError("You must specify bbox")

    monkeypatch.setattr(fidelity, "_logits", refuses)
    report = export(
        tmp_path / "adapter", tmp_path / "out", "--base", tmp_path / "base", "--format", "merged", capsys=capsys
    )
    assert report["fidelity"] is None and "You must specify bbox" in report["fidelity_text"]


@pytest.mark.parametrize("same", [True, False])
def test_going_on_compares_the_copy_with_its_own_base(tmp_path, same):
    """A new run must begin from the adapter's function, or say why it cannot."""
    foreign(tmp_path / "adapter", base(tmp_path / "base"), **HEADS["head"])
    config = AdaLoraConfig(init_r=12, target_r=4, target_modules=["q_proj", "lm_head"])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    if not same:
        model.lm_head.weight.data[0] += 1
    ids = torch.arange(20)[None]
    expected = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )(input_ids=ids).logits
    inject_adalora(model, config)
    if same:
        start_from_adapter(model, tmp_path / "adapter")
        assert (model.eval()(input_ids=ids).logits - expected).abs().max() < 1e-5
    else:
        with pytest.raises(UserError, match=r"'lm_head\.weight'"):
            start_from_adapter(model, tmp_path / "adapter")
