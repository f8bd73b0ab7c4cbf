"""A mixture of experts in 4 bits at export: merged into the values that training had, an expert at a time."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import AdaLoraConfig
from adalora_scale.experts.modules import split_all_experts
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.base_checkpoint import BaseCheckpoint
from adalora_scale.export.dequantise import dequantised_weights
from adalora_scale.export.merge import plan_merge
from adalora_scale.export.peft_adalora import save_adapter
from adalora_scale.quantization import functional
from adalora_scale.quantization.linear import quantize_model
from adalora_scale.quantization.spec import QuantSpec
from tests.adalora import tiny as adapters
from tests.experts.models import EXPERTS, tiny
from tests.experts.test_saving import logits
from tests.export.adapters import export

MERGED = ["--format", "merged", "--base"]
NF4 = {"quant_type": "nf4", "blocksize": 64, "double_quant": True}
FP4 = {"quant_type": "fp4", "blocksize": 32, "double_quant": False}
full = pytest.mark.full
DENSE = ["q_proj", "v_proj"]


def opened(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")


def trained(base, run, *, skipped=None, targets="all-linear", **spec):
    """A live model over a 4-bit base that computes in float32, and its adapter in `run`."""
    torch.manual_seed(0)
    model = quantize_model(opened(base), QuantSpec(compute_dtype=torch.float32, **spec), skipped)
    inject_adalora(model, AdaLoraConfig(init_r=3, target_r=2, lora_alpha=3, target_modules=targets))
    save_adapter(adapters.randomise(model, std=0.3), run)
    return model.eval()


def assert_same(folder, live, base):
    got, expected, untouched = logits(opened(folder)), logits(live), logits(opened(base))
    assert (untouched - expected).norm() > 0.01 * expected.norm()
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def keys(folder):
    return {key for file in folder.glob("*.safetensors") for key in safe_open(file, "pt").keys()}  # noqa: SIM118


# Per-expert checkpoints, gated and not; one tensor for all: input first and biased, as it is, given every token.
@pytest.mark.parametrize(
    ("kind", "spec"),
    [
        ("mixtral", NF4), ("gpt_oss", FP4),
        *(pytest.param(*each, marks=full) for each in (("granitemoe", NF4), ("llama4_text", NF4), ("nemotron_h", FP4))),
    ],
)  # fmt: skip
def test_merged_into_the_dequantised_values_it_is_the_live_model(tmp_path, capsys, kind, spec):
    """Else gate and up are quantised apart, experts have others' scales, or a turned tensor is quantised as it lies."""
    base = tmp_path / "base"
    tiny(kind, dtype=torch.float32).save_pretrained(base)
    live = trained(base, tmp_path / "run", **spec)
    assert "experts" in AdapterFile(tmp_path / "run").record["quantisation"]
    report = export(tmp_path / "run", tmp_path / "out", *MERGED, base, "--dequantise", capsys=capsys)
    assert_same(tmp_path / "out", live, base)
    assert keys(tmp_path / "out") == keys(base)
    assert report["fidelity"]["relative"] <= 1e-4 and not report["failed"]
    export(tmp_path / "run", tmp_path / "original", *MERGED, base, "--no-fidelity", capsys=capsys)
    original = logits(opened(tmp_path / "original"))
    assert (original - logits(live)).abs().max() > 1e-3 * logits(live).abs().max()  # the quantisation error


@pytest.mark.parametrize("kind", [pytest.param("mixtral", marks=full), "gpt_oss"])
def test_experts_that_the_base_stores_in_4_bits_are_merged_dequantised(tmp_path, capsys, kind):
    """`adalora-scale quantize` may have written the only copy that there is; no other program reads it."""
    base, stored = tmp_path / "base", tmp_path / "stored"
    tiny(kind, dtype=torch.float32).save_pretrained(base)
    assert main(["quantize", str(base), str(stored), "--compute-dtype", "float32"]) == 0
    live = trained(base, tmp_path / "run", **NF4)
    report = export(tmp_path / "run", tmp_path / "out", *MERGED, stored, "--dequantise", capsys=capsys)
    assert_same(tmp_path / "out", live, base)
    assert report["fidelity"]["relative"] <= 1e-4 and not report["failed"]
    assert not any("absmax" in key for key in keys(tmp_path / "out"))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    arguments = ["export", tmp_path / "run", tmp_path / "no", *MERGED, stored]
    assert main(list(map(str, arguments))) == 2
    assert "stored in 4 bits; pass --dequantise" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("skipped", "targets"),
    [pytest.param(["experts"], "all-linear", marks=full), (["down_proj"], "all-linear"), (None, DENSE)],
)
def test_experts_that_were_not_quantised_or_not_adapted_are_told_apart(tmp_path, capsys, skipped, targets):
    """Else what training had in 16 bits is quantised, or what it had in 4 bits and did not adapt is not."""
    base = tmp_path / "base"
    tiny("mixtral", dtype=torch.float32).save_pretrained(base)
    live = trained(base, tmp_path / "run", skipped=skipped, targets=targets, **NF4)
    report = export(tmp_path / "run", tmp_path / "out", *MERGED, base, "--dequantise", capsys=capsys)
    assert_same(tmp_path / "out", live, base)
    assert report["fidelity"]["relative"] <= 1e-4


@full
@pytest.mark.parametrize("shape", [[], [5], [5, 48, 16, 1], [4, 48, 16], [5, 16, 48], [5, 768], [0, 0, 0]])
def test_a_state_that_does_not_fit_is_refused_in_one_line(tmp_path, capsys, shape):
    """Files of strangers: else experts get others' blocks, or a traceback."""
    base, stored = tmp_path / "base", tmp_path / "stored"
    tiny("mixtral", dtype=torch.float32).save_pretrained(base)
    assert main(["quantize", str(base), str(stored), "--compute-dtype", "float32"]) == 0
    trained(base, tmp_path / "run", **NF4)
    (file,) = stored.glob("*.safetensors")
    tensors = load_file(file)
    (key,) = (key for key in tensors if "layers.0.mlp.experts.gate_up_proj.quant_state" in key)
    state = json.loads(bytes(tensors[key].tolist()))
    assert state["shape"] == [5, 48, 16]
    tensors[key] = torch.tensor(list(json.dumps(state | {"shape": shape}).encode()), dtype=torch.uint8)
    file.unlink()
    save_file(tensors, file, {"format": "pt"})
    (stored / "export.json").unlink(missing_ok=True)
    capsys.readouterr()
    arguments = ["export", tmp_path / "run", tmp_path / "out", *MERGED, stored, "--dequantise", "--no-fidelity"]
    assert main(list(map(str, arguments))) == 2
    said = capsys.readouterr().err
    print(said)
    assert "gate_up_proj" in said and not (tmp_path / "out").exists()


def test_one_expert_at_a_time_is_in_memory(tmp_path, monkeypatch):
    """Else merging a mixture of 128 experts takes the memory of a layer, or of the model."""
    base = tmp_path / "base"
    tiny("gpt_oss", dtype=torch.float32).save_pretrained(base)
    trained(base, tmp_path / "run", **NF4)
    adapter = AdapterFile(tmp_path / "run")
    checkpoint = BaseCheckpoint(base, task=adapter.task, num_labels=None)
    sizes, dequantize = [], functional.dequantize_blocks
    monkeypatch.setattr(
        functional, "dequantize_blocks", lambda *args: sizes.append(args[1].numel() * args[2].blocksize) or
        dequantize(*args)
    )  # fmt: skip
    plan = plan_merge(adapter, checkpoint, dequantised_weights(adapter, checkpoint))
    assert sizes == []  # planning reads headers
    (planned,) = (tensor for tensor in plan.tensors if tensor.key == "model.layers.0.mlp.experts.gate_up_proj")
    pieces = [piece.shape for piece in planned.pieces()]
    split_all_experts(checkpoint.model)
    layer = checkpoint.model.get_submodule("model.layers.0.mlp.experts.gate_up_proj")
    assert sizes == [layer.in_features * layer.out_features] * EXPERTS
    assert pieces == [(layer.in_features, layer.out_features)] * EXPERTS
