"""Streaming a base from its files: the weights that transformers and bitsandbytes load, or an error that says why."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.placing import streaming
from adalora_scale.placing.model import load_model
from adalora_scale.quantization.base_files import INDEX_NAME, SINGLE_NAME
from adalora_scale.quantization.linear import Linear4bit, quantize_model
from adalora_scale.quantization.spec import QuantSpec

NO_DROPOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
IDS = torch.arange(3, 40).unsqueeze(0)


@torch.no_grad()
def logits(model):
    return model.train()(IDS).logits  # bitsandbytes repacks weights for CPU inference in eval mode


@pytest.fixture
def llama(tmp_path):
    """A small untied Llama in several shards."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path / "llama"
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="100KB")
    assert (folder / INDEX_NAME).is_file()
    return folder


def bnb_model(path, double_quant=True, dtype=torch.float32):
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=dtype,
    )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=config)


@pytest.mark.parametrize("double_quant", [True, False])
def test_logits_are_those_of_bitsandbytes_model(stories260k, run_config, double_quant):
    """A tied model in one file; the loss over a 4-bit base must be what everybody else's is."""
    ours = load_model(run_config(stories260k, load_in_4bit=True, bnb_4bit_use_double_quant=double_quant))
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert torch.equal(logits(ours), logits(bnb_model(stories260k, double_quant)))
    plain = AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32)
    assert (logits(ours) - logits(plain)).abs().max() > 0
    assert torch.equal(ours.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    labels = IDS.clone()
    assert ours(IDS, labels=labels).loss.item() == pytest.approx(plain(IDS, labels=labels).loss.item(), rel=0.1)


def test_shards_with_an_index_stream_to_the_same_bytes(llama, run_config):
    """And what is not quantised is exactly what the file holds."""
    ours = load_model(run_config(llama, load_in_4bit=True))
    exact = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    expected = quantize_model(exact, QuantSpec(compute_dtype=torch.float32))
    assert expected.state_dict().keys() == ours.state_dict().keys()
    for name, value in expected.state_dict().items():
        assert torch.equal(value, ours.state_dict()[name]), name
    nested = {name: layer.nested for name, layer in expected.named_modules() if isinstance(layer, Linear4bit)}
    assert len(nested) == 14
    assert all(torch.equal(ours.get_submodule(name).nested, value) for name, value in nested.items())


def test_gpt2_is_quantised_in_the_orientation_of_its_matrices(tmp_path, run_config):
    """Conv1D stores weights the other way round; transformers turns them before it quantises."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_embd": 64, "n_head": 2, "vocab_size": 64, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**shape, initializer_range=0.2, **NO_DROPOUT)).save_pretrained(tmp_path / "gpt2")
    ours = load_model(run_config(tmp_path / "gpt2", load_in_4bit=True))
    assert torch.equal(logits(ours), logits(bnb_model(tmp_path / "gpt2")))


@pytest.mark.parametrize("double_quant", [True, False])
def test_prequantised_checkpoints_go_both_ways(llama, run_config, tmp_path, double_quant, capsys):
    """Ours loads in transformers, theirs loads here, and both compute what quantising at load computes."""
    expected = logits(bnb_model(llama, double_quant))
    flags = [] if double_quant else ["--no-double-quant"]
    options = ["--torch-dtype", "float32", "--compute-dtype", "float32", "--max-shard-gb", "0.00003"]
    assert main(["quantize", str(llama), str(tmp_path / "ours"), *options, *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["files"] > 2 and report["tensors_in_4bit"] == 14
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert type(theirs.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert torch.equal(logits(theirs), expected)
    bnb_model(llama, double_quant).save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert torch.equal(logits(load_model(run_config(tmp_path / folder))), expected), folder
    assert main(["quantize", str(tmp_path / "ours"), str(tmp_path / "again")]) == 2
    assert "in 4 bits already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    assert main(["quantize", str(llama), str(tmp_path / "ours")]) == 2  # nothing is overwritten
    assert "holds something already" in capsys.readouterr().err


def test_storage_dtype_of_others_makes_no_difference(llama, run_config, tmp_path):
    """FSDP1 users quantise into bfloat16 storage: the same bytes, two to an element."""
    bnb_model(llama).save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs" / SINGLE_NAME
    tensors = load_file(file)
    for name in [name for name in tensors if f"{name}.absmax" in tensors]:
        tensors[name] = tensors[name].view(-1).view(torch.bfloat16).unsqueeze(1)
    save_file(tensors, file, metadata={"format": "pt"})
    assert torch.equal(logits(load_model(run_config(tmp_path / "theirs"))), logits(bnb_model(llama)))


def test_classifier_on_a_language_model_gets_a_new_head(stories260k, run_config):
    """The head is drawn, not missing; what belongs to the other task is named, not refused."""
    config = run_config(stories260k, task="sequence_classification", load_in_4bit=True)
    torch.manual_seed(3)
    started = streaming.begin(
        config, device=torch.device("cpu"), label_names=["a", "b", "c"], new_heads=lambda model, absent: ["score"]
    )
    model = streaming.load_whole(started)
    assert model.score.weight.shape == (3, 64) and 0.001 < model.score.weight.std() < 0.1
    assert isinstance(model.model.layers[0].mlp.up_proj, Linear4bit) and not isinstance(model.score, Linear4bit)
    torch.manual_seed(3)
    theirs = AutoModelForSequenceClassification.from_pretrained(stories260k, num_labels=3, dtype=torch.float32)
    assert torch.equal(model.score.weight, theirs.score.weight)


def test_adapters_and_fingerprint_do_not_depend_on_the_loader(stories260k, run_config):
    """FSDP2 streams an unquantised base, DDP does not: a run moves from one to the other."""
    config = AdaLoraConfig(init_r=4, target_r=2)
    torch.manual_seed(0)
    plain = inject_adalora(AutoModelForCausalLM.from_pretrained(stories260k, dtype=torch.float32), config)
    torch.manual_seed(0)
    started = streaming.begin(run_config(stories260k), device=torch.device("cpu"))
    streaming.inject(started, config)
    streamed = streaming.load_whole(started)
    assert streamed.adalora.base_fingerprint == plain.adalora.base_fingerprint
    expected = dict(plain.named_parameters())
    for name, parameter in streamed.named_parameters():
        assert torch.equal(parameter, expected.pop(name)), name
    assert not expected
    in_4bit = streaming.begin(run_config(stories260k, load_in_4bit=True), device=torch.device("cpu"))
    assert streaming.inject(in_4bit, config).adalora.base_fingerprint != plain.adalora.base_fingerprint


def test_the_share_counts_experts_that_stay_as_they_are():
    """A 4-bit run of an MoE model whose experts are 16-bit is no 4-bit run; the line printed at start says so."""
    config = MixtralConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=2,
    )  # fmt: skip
    model = quantize_model(MixtralForCausalLM(config), QuantSpec(), ["experts"])
    attention, experts, head = 2 * 64 * 64 + 2 * 64 * 32, 2 * 3 * 64 * 64, 64 * 64
    described = streaming.describe(model)
    assert f"{attention / (attention + experts + head):.1%} of the linear weights quantised" in described
    assert "model.layers.0.mlp.experts.gate_up_proj" in described


def test_weights_that_differ_are_not_tied(tmp_path, run_config):
    """config.json says tied, the files say otherwise: transformers believes the files."""
    torch.manual_seed(0)
    shape = dict(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False)).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    started = streaming.begin(run_config(tmp_path / "model"), device=torch.device("cpu"))
    ours = streaming.load_whole(started)
    assert torch.equal(logits(ours), logits(AutoModelForCausalLM.from_pretrained(tmp_path / "model")))


def test_what_transformers_drops_is_dropped_here(stories260k, tmp_path, run_config):
    """Old Llama checkpoints carry rotary frequencies."""
    shutil.copytree(stories260k, tmp_path / "old", copy_function=shutil.copyfile)
    edit(tmp_path / "old", lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    begin(run_config(tmp_path / "old", load_in_4bit=True))


def test_generation_config_comes_along(stories260k, tmp_path, run_config):
    """Else evaluation does not stop where the 16-bit base stops."""
    shutil.copytree(stories260k, tmp_path / "base", copy_function=shutil.copyfile)
    file = tmp_path / "base" / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [2, 9]}))
    assert load_model(run_config(tmp_path / "base", load_in_4bit=True)).generation_config.eos_token_id == [2, 9]


def test_classifier_without_a_head_loads_outside_training_too(stories260k, run_config):
    """Evaluation and export see the base that training saw: the head is never quantised."""
    config = run_config(stories260k, task="sequence_classification", load_in_4bit=True)
    model = load_model(config, ["a", "b", "c"])
    assert type(model.score) is nn.Linear


def test_modules_trained_in_full_stay_in_16_bits(stories260k, run_config):
    """Codes have no gradient."""
    adalora = AdaLoraConfig(init_r=4, target_r=2, modules_to_save=["layers.0.mlp"])
    config = dataclasses.replace(run_config(stories260k, load_in_4bit=True), adalora=adalora)
    started = begin(config)
    model = streaming.inject(started, adalora)
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    with pytest.raises(UserError, match=r"modules_to_save: 'model\.layers\.1\.mlp' is in 4 bits"):
        inject_adalora(begin(run_config(stories260k, load_in_4bit=True)).model,
                       adalora.replace(modules_to_save=["layers.1.mlp"]))  # fmt: skip


# ---- bad input: one error, before memory fills


def begin(config):
    return streaming.begin(config, device=torch.device("cpu"))


def edit(folder, change):
    """Change the tensors of a checkpoint in one file."""
    tensors = load_file(folder / SINGLE_NAME)
    change(tensors)
    save_file(tensors, folder / SINGLE_NAME, metadata={"format": "pt"})


@pytest.fixture
def single(llama, tmp_path):
    """The same Llama in one file."""
    folder = tmp_path / "single"
    LlamaForCausalLM.from_pretrained(llama).save_pretrained(folder)
    return folder


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(UP), rf"lacks '{UP}'"),
        (lambda t: t.update(zzz=torch.zeros(2)), "holds 'zzz', which LlamaForCausalLM has not"),
        (lambda t: t.update({UP: torch.zeros(64, 64)}), rf"'{UP}' has shape \(64, 64\).*model \(128, 64\)"),
        (lambda t: t.update({UP: torch.zeros(128, 64, dtype=torch.int8)}), rf"'{UP}' in .* is I8"),
        (lambda t: t.update({UP: torch.zeros(128, 64).to(torch.float8_e4m3fn)}), rf"'{UP}' in .* is F8_E4M3"),
    ],
    ids=["missing", "unexpected", "shape", "int8", "float8"],
)
@pytest.mark.parametrize("four_bit", [True, False])
def test_tensors_that_do_not_fit_are_named(single, run_config, change, message, four_bit):
    """Else a layer keeps random weights, or fails deep inside a kernel."""
    begin(run_config(single, load_in_4bit=four_bit))
    edit(single, change)
    with pytest.raises(UserError, match=message):
        begin(run_config(single, load_in_4bit=four_bit))


def test_truncated_file_and_missing_shard_are_named(llama, single, run_config):
    """A download that broke off."""
    file = single / SINGLE_NAME
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged or truncated"):
        begin(run_config(single, load_in_4bit=True))
    shards = sorted(llama.glob("model-*.safetensors"))
    kept = shards[1].read_bytes()
    shards[1].unlink()
    with pytest.raises(UserError, match=rf"names {shards[1].name}, which is not in"):
        begin(run_config(llama, load_in_4bit=True))
    shutil.copyfile(shards[0], shards[1])  # a shard under another's name
    with pytest.raises(UserError, match=rf"{shards[1].name} does not hold"):
        begin(run_config(llama, load_in_4bit=True))
    shards[1].write_bytes(kept)
    begin(run_config(llama, load_in_4bit=True))


def test_pickles_and_foreign_quantisation_are_refused(single, run_config):
    """Pickles run code and cannot be sliced; GPTQ's weights are no floats."""
    config = json.loads((single / "config.json").read_text())
    (single / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match="quantised with 'gptq'"):
        begin(run_config(single, load_in_4bit=True))
    (single / "config.json").write_text(json.dumps(config))
    (single / SINGLE_NAME).rename(single / "pytorch_model.bin")
    with pytest.raises(Unsupported, match=r"pytorch_model\.bin.*save_pretrained"):
        begin(run_config(single, load_in_4bit=True))


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "quant_state.bitsandbytes__nf4", "quant_map"])
def test_incomplete_4_bit_states_are_refused(llama, run_config, tmp_path, part):
    """Weights without their scales are noise."""
    bnb_model(llama).save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs", lambda t: t.pop(f"{UP}.{part}"))
    with pytest.raises(UserError, match=r"up_proj"):
        load_model(run_config(tmp_path / "theirs"))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"][3:].clone()}), "absmax"),
        (lambda t: t.update({f"{UP}.absmax": t[f"{UP}.absmax"].repeat(2)}), "absmax"),
        (lambda t: t.update({UP: t[UP].repeat(2, 1)}), "up_proj.weight"),
        (lambda t: t.update({f"{UP}.nested_absmax": t[f"{UP}.nested_absmax"].repeat(2)}), "nested_absmax"),
        (lambda t: t.update({f"{UP}.quant_state.bitsandbytes__nf4": as_json({"quant_type": "nf4"})}), "state"),
        (lambda t: t.update({f"{UP}.quant_state.bitsandbytes__nf4": as_json([1])}), "state"),
    ],
    ids=["short absmax", "long absmax", "long weight", "long nested", "no shape", "a list"],
)
def test_4_bit_tensors_of_a_wrong_size_are_refused(llama, run_config, tmp_path, change, name):
    """Twice as many scales would load without a word."""
    bnb_model(llama).save_pretrained(tmp_path / "theirs")
    edit(tmp_path / "theirs", change)
    with pytest.raises(UserError, match=rf"{name}.*download the checkpoint again"):
        begin(run_config(tmp_path / "theirs"))


def as_json(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


def test_a_typo_among_skipped_modules_is_an_error(llama, run_config):
    """Else what the user wanted to keep is quantised."""
    with pytest.raises(UserError, match=r"bnb_4bit_skip_modules: 'upproj' matches no module"):
        begin(run_config(llama, load_in_4bit=True, bnb_4bit_skip_modules=["upproj"]))
