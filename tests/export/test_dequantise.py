"""4-bit bases at export: merging into the original weights and into the dequantised ones, each said by name."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import load_config
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.peft_adalora import load_adapter, save_adapter
from adalora_scale.quantization.linear import Linear4bit, quantize_model
from adalora_scale.quantization.spec import QuantSpec
from adalora_scale.training.run import train as train_run
from tests.adalora import tiny
from tests.export.adapters import assert_same_function, base_folder, export, load, logits, options

MERGED = ["--format", "merged", "--base"]
SPECS = {
    "nf4": {"quant_type": "nf4", "blocksize": 64, "double_quant": True},
    "fp4": {"quant_type": "fp4", "blocksize": 32, "double_quant": False},
}


def adapter_on_4bit(base, kind, folder, **spec):
    """A live model: 4-bit base that computes in float32, with an adapter whose every triplet works."""
    torch.manual_seed(0)
    model = quantize_model(load(base, kind), QuantSpec(compute_dtype=torch.float32, **spec))
    tiny.randomise(inject_adalora(model, options(kind)), std=0.15)
    save_adapter(model, folder)
    return model.eval()


@pytest.mark.shows("exports", form="merged", of="over a 4-bit base")
@pytest.mark.parametrize("kind", ["stories260k", "gpt2"])
@pytest.mark.parametrize("spec", SPECS)
def test_merging_into_the_dequantised_values_gives_the_4bit_models_logits(request, tmp_path, capsys, kind, spec):
    """What was trained is 4-bit base + adapter; merged into other weights it is another model."""
    base = base_folder(kind, tmp_path, request)
    live = adapter_on_4bit(base, kind, tmp_path / "run", **SPECS[spec])
    record = AdapterFile(tmp_path / "run").record["quantisation"]
    assert {key: record[key] for key in SPECS[spec]} == SPECS[spec] and record["kept"] == ["lm_head"]
    report = export(tmp_path / "run", tmp_path / "out", *MERGED, base, "--dequantise", capsys=capsys)
    assert_same_function(load(tmp_path / "out", kind), logits(live), load(base, kind))
    assert report["fidelity"]["relative"] <= 1e-5
    assert f"after {spec} quantisation" in report["what"]
    assert not any("trained on" in note for note in report["notes"])

    report = export(tmp_path / "run", tmp_path / "original", *MERGED, base, capsys=capsys)
    original = load(tmp_path / "original", kind)
    size = logits(live).abs().max()
    assert (logits(original) - logits(live)).abs().max() > 1e-3 * size  # the quantisation error
    expected = load_adapter(load(base, kind), tmp_path / "run")
    assert_same_function(original, logits(expected), load(base, kind))
    assert any(f"trained on the {spec} values" in note for note in report["notes"])
    assert "in their own dtype" in report["what"]


def test_adapter_of_a_4bit_run_is_merged_both_ways_by_the_command_line(stories260k, tmp_path, capsys):
    """The whole way: a run with load_in_4bit, streamed and quantised while loading, then export."""
    rows = "".join(json.dumps({"text": f"Once upon a time there was a dog number {i}."}) + "\n" for i in range(16))
    (tmp_path / "train.jsonl").write_text(rows)
    (tmp_path / "run.yaml").write_text(f"""
model: {{model_name_or_path: {stories260k}, torch_dtype: bfloat16, load_in_4bit: true, bnb_4bit_blocksize: 32}}
data: {{train: {tmp_path}/train.jsonl, max_length: 32}}
adalora: {{init_r: 3, target_r: 2, lora_alpha: 6, deltaT: 2, tinit: 1, tfinal: 2}}
training: {{max_steps: 8, per_device_train_batch_size: 4, learning_rate: 0.01, use_cpu: true,
           output_dir: {tmp_path}/run}}
""")
    train_run(load_config(tmp_path / "run.yaml"))
    record = AdapterFile(tmp_path / "run").record
    assert record["quantisation"]["blocksize"] == 32 and record["quantisation"]["weight_dtype"] == "bfloat16"
    assert record["base"].keys() == {"adapted", "rest"}  # of the weights before they were quantised
    run = tmp_path / "run"
    for name, more in (("original", []), ("dequantised", ["--dequantise"])):
        report = export(run, tmp_path / name, *MERGED, stories260k, *more, capsys=capsys)
        assert report["fidelity"]["relative"] <= 1e-5
        AutoModelForCausalLM.from_pretrained(tmp_path / name)
    other = AutoModelForCausalLM.from_pretrained(stories260k)
    other.model.layers[0].mlp.up_proj.weight.data.mul_(1.1)
    other.save_pretrained(tmp_path / "other")
    assert main(list(map(str, ["export", run, tmp_path / "no", *MERGED, tmp_path / "other"]))) == 2
    assert "trained on another base" in capsys.readouterr().err


@pytest.mark.parametrize("double", [True, False])
def test_checkpoint_that_bitsandbytes_wrote_is_merged_dequantised(request, tmp_path, capsys, double):
    """Pre-quantised checkpoints from a hub have no original to merge into; without --dequantise they are refused."""
    source = base_folder("stories260k", tmp_path, request)
    quantisation = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = tmp_path / "4bit"
    AutoModelForCausalLM.from_pretrained(
        source, quantization_config=quantisation, dtype=torch.float32, device_map="cpu"
    ).save_pretrained(base)
    assert any("absmax" in name for name in load_file(base / "model.safetensors"))
    torch.manual_seed(0)
    live = tiny.randomise(
        inject_adalora(
            quantize_model(load(source, "stories260k"), QuantSpec(double_quant=double, compute_dtype=torch.float32)),
            options("stories260k"),
        ),
        std=0.15,
    ).eval()
    assert any(isinstance(module, Linear4bit) for module in live.modules())
    save_adapter(live, tmp_path / "run")
    report = export(tmp_path / "run", tmp_path / "out", *MERGED, base, "--dequantise", capsys=capsys)
    merged, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_same_function(merged, logits(live), load(source, "stories260k"))
    assert report["fidelity"]["relative"] <= 1e-5
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    assert not any("absmax" in name for name in load_file(tmp_path / "out" / "model.safetensors"))

    arguments = ["export", tmp_path / "run", tmp_path / "no", *MERGED, base]
    assert main(list(map(str, arguments))) == 2
    assert "stored in 4 bits; pass --dequantise" in capsys.readouterr().err


def test_dequantise_without_a_4bit_base_and_other_quantisers_are_refused(request, tmp_path, capsys):
    """Quietly doing something else than what was asked for would be found out in production."""
    base = base_folder("gpt2", tmp_path, request)
    model = inject_adalora(load(base, "gpt2"), options("gpt2"))
    save_adapter(tiny.randomise(model), tmp_path / "run")
    arguments = [*map(str, ["export", tmp_path / "run", tmp_path / "out", *MERGED, base])]
    assert main([*arguments, "--dequantise"]) == 2
    assert "does not say that it was trained on a 4-bit base" in capsys.readouterr().err
    config = json.loads((base / "config.json").read_text())
    for dequantise in ([], ["--dequantise"]):
        (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
        assert main([*arguments, *dequantise]) == 2
        assert "is quantised with 'gptq'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
