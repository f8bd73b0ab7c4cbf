"""Mixtures of experts streamed from their files, fused or one tensor an expert: in 16 and 4 bits, each byte once."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import Concatenate, MergeModulelist, Transpose, WeightConverter

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import AdaLoraConfig
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import split_all_experts
from adalora_scale.placing import streaming
from adalora_scale.placing.stored import stored_weights
from adalora_scale.quantization import fill_experts
from adalora_scale.quantization.base_files import SINGLE_NAME
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.quantization.fused import place_of
from adalora_scale.quantization.linear import Linear4bit, quantize_model
from adalora_scale.quantization.spec import QuantSpec
from tests.architectures.small import small_model
from tests.experts.models import KINDS, VOCABULARY, tiny

CPU = torch.device("cpu")
IDS = torch.arange(3, 23).view(2, 10) % VOCABULARY
AN_EXPERT_EACH = {"mixtral", "qwen3_moe", "deepseek_v3", "phimoe", "nemotron_h"}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def saved(kind, folder, **options):
    """Save a tiny model as transformers does and return (folder, bytes of all its tensors)."""
    tiny(kind, dtype=torch.float32, **options).save_pretrained(folder)
    tensors = load_file(folder / SINGLE_NAME)
    each = any(re.search(r"experts\.\d+\.", name) for name in tensors)
    assert each == (kind in AN_EXPERT_EACH)  # both forms of checkpoints are among them
    return folder, sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def begin(config):
    return streaming.begin(config, device=CPU)


def reference(folder):
    options = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def state(model):
    """All parameters and buffers, second levels of dense layers included."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def assert_same(mine, wanted):
    mine, wanted = state(mine), state(wanted)
    assert mine.keys() == wanted.keys()
    for name, value in wanted.items():
        assert value.dtype == mine[name].dtype and torch.equal(value, mine[name]), name


def test_a_streamed_mixture_is_the_one_that_transformers_loads(kind, tmp_path, run_config, monkeypatch):
    """In 16 bits and quantised on the way, every byte of the files read once, in whatever pieces."""
    folder, size = saved(kind, tmp_path / kind)
    plain = reference(folder)
    started = begin(run_config(folder, attn_implementation="eager"))
    streamed = streaming.load_whole(started)
    assert started.plan.checkpoint.bytes_read == size
    assert any(isinstance(module, ExpertLinear) for module in streamed.modules())
    with torch.no_grad():
        torch.testing.assert_close(streamed(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-6)
    split_all_experts(plain)
    assert_same(streamed, plain)
    monkeypatch.setattr(fill_experts, "CPU_PIECE", 200)
    started = begin(run_config(folder, load_in_4bit=True))
    in_4bit = streaming.load_whole(started)
    assert started.plan.checkpoint.bytes_read == size
    assert_same(in_4bit, quantize_model(plain, QuantSpec(compute_dtype=torch.float32)))


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"], indirect=True)
def test_a_mixture_is_quantised_offline_and_read_back(kind, double_quant, tmp_path, run_config, capsys):
    """The bytes of quantising at load, from a file of a quarter of the size; a router stays what it was."""
    folder, _ = saved(kind, tmp_path / kind)
    flags = ["--torch-dtype", "float32", "--compute-dtype", "float32"] + ["--no-double-quant"] * (not double_quant)
    assert main(["quantize", str(folder), str(tmp_path / "out"), *flags, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["tensors_in_4bit"] == 2 * (4 + 2) and not report["read_by_transformers"]
    fresh = streaming.load_whole(begin(run_config(folder, load_in_4bit=True, bnb_4bit_use_double_quant=double_quant)))
    started = begin(run_config(tmp_path / "out"))
    read_back = streaming.load_whole(started)
    assert_same(read_back, fresh)
    assert any(isinstance(module, ExpertLinear4bit) for module in read_back.modules())


def test_experts_left_in_16_bits_are_written_under_their_own_names(tmp_path, run_config, capsys):
    """transformers opens such a checkpoint, with everything else in 4 bits."""
    # bitsandbytes' own CPU kernel takes wrong scales for rows that are no multiple of a block.
    folder, _ = saved("granitemoe", tmp_path / "granite", hidden_size=64)
    flags = ["--torch-dtype", "float32", "--compute-dtype", "float32", "--skip-modules", "experts"]
    assert main(["quantize", str(folder), str(tmp_path / "out"), *flags]) == 0
    said = capsys.readouterr().out
    assert "of several matrices stay as they are: model.layers.0.block_sparse_moe.experts" in said
    assert "transformers does not read" not in said
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, attn_implementation="eager")
    ours = streaming.load_whole(begin(run_config(tmp_path / "out", attn_implementation="eager")))
    assert type(theirs.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert isinstance(ours.model.layers[0].self_attn.q_proj, Linear4bit)
    with torch.no_grad():  # bitsandbytes repacks weights for CPU inference in eval mode
        torch.testing.assert_close(ours(IDS).logits, theirs.train()(IDS).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "llama4_text"], indirect=True)
def test_fingerprint_and_digests_are_those_of_the_model_in_memory(kind, tmp_path, run_config):
    """A run moves between loaders and engines; an adapter must know its base whichever of them loaded it."""
    folder, _ = saved(kind, tmp_path / kind)
    config = AdaLoraConfig(init_r=2, target_r=1, target_modules=["down_proj", "q_proj"])
    plain = reference(folder)
    split_all_experts(plain)
    started = begin(run_config(folder, attn_implementation="eager"))
    read = stored_weights(started)
    down = next(name for name, _ in plain.named_parameters() if name.endswith("experts.down_proj.weight"))
    assert torch.equal(read(down), plain.get_parameter(down))
    before = started.plan.checkpoint.bytes_read
    streaming.inject(started, config)
    assert started.plan.checkpoint.bytes_read - before < 16 * 64 * 4 * 8  # a row a matrix, not an expert
    inject_adalora(plain, config)
    assert started.model.adalora.base_fingerprint == plain.adalora.base_fingerprint
    assert started.model.adalora.base_digests == plain.adalora.base_digests


@pytest.mark.parametrize(
    ("sources", "operations", "place"),
    [
        (["mlp.experts.*.up_proj.weight"], [MergeModulelist(0)], (12, 0)),
        (
            [r"\.experts.*.gate_proj.weight", r"\.experts.*.up_proj.weight"],
            [MergeModulelist(0), Concatenate(1)],
            (12, 1),
        ),
        (["mlp.experts.*.up_proj.weight"], [MergeModulelist(1)], None),
        (["mlp.experts.*.up_proj.weight"], [MergeModulelist(0), Transpose(1, 2)], None),
        ([r".experts.*.gate_proj.weight", r".experts.*.up_proj.weight"], [MergeModulelist(0), Concatenate(2)], None),
        (["mlp.experts.12.up_proj.weight"], [Concatenate(0)], None),
    ],
    ids=["stacked", "joined", "stacked otherwise", "turned", "joined otherwise", "no experts"],
)
def test_only_stacking_experts_and_joining_rows_is_read_by_slices(sources, operations, place):
    """A slice of anything else is not a slice of the sources: the model would have other weights."""
    converter = WeightConverter(sources, "mlp.experts.gate_up_proj", operations=operations)
    assert place_of(converter, sources[-1], "model.layers.3.mlp.experts.12.up_proj.weight") == place


def test_a_name_that_a_renaming_would_take_away_is_kept(tmp_path, run_config):
    """DeepSeek-V4's `.norm.` becomes `.kv_norm.` inside layers; transformers leaves the model's last norm alone."""
    model = small_model("deepseek_v4", "causal")
    with torch.no_grad():
        model.model.norm.weight.normal_()
    model.save_pretrained(tmp_path / "model")
    streamed = streaming.load_whole(begin(run_config(tmp_path / "model", bnb_4bit_blocksize=32, load_in_4bit=True)))
    split_all_experts(model)
    assert_same(streamed, quantize_model(model.eval(), QuantSpec(compute_dtype=torch.float32, blocksize=32)))


PART = "model.layers.1.mlp.experts.3.w2.weight"


def stacked(tensors):
    parts = [tensors[PART.replace("3", str(expert))] for expert in range(5)]
    tensors["model.layers.1.mlp.experts.down_proj"] = torch.stack(parts)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.pop(PART), UserError, r"lacks a tensor of expert 3 beside '.*1\.mlp\.experts\.0\.w2"),
        (lambda t: [t.pop(PART.replace("3", n)) for n in "34"], UserError, r"shape \(3, 16, 24\).*model \(5, 16, 24\)"),
        (lambda t: t.update({PART: t[PART].T.contiguous()}), UserError, r"experts\.3\.w2\.weight' is F32 \(24, 16\)"),
        (lambda t: t.update({PART: t[PART].half()}), UserError, r"experts\.3\.w2\.weight' is F16"),
        (stacked, UserError, r"'model\.layers\.1\.mlp\.experts\.down_proj' twice"),
        (lambda t: t.update({f"{PART}.absmax": torch.zeros(6)}), Unsupported, r"single experts in 4 bits"),
    ],
    ids=["one missing", "the last missing", "turned", "another dtype", "twice", "4 bits an expert"],
)
@pytest.mark.parametrize("four_bit", [True, False])
def test_what_is_wrong_with_a_checkpoint_is_named(tmp_path, run_config, change, error, message, four_bit):
    """Else an expert keeps random weights, or another's."""
    folder, _ = saved("mixtral", tmp_path / "mixtral")
    file = folder / SINGLE_NAME
    renamed = {name.replace("block_sparse_moe", "mlp"): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    begin(run_config(folder, load_in_4bit=four_bit))
    change(renamed)
    save_file(renamed, file, metadata={"format": "pt"})
    with pytest.raises(error, match=message):
        begin(run_config(folder, load_in_4bit=four_bit))


def test_published_gpt_oss_is_refused_by_its_format(tmp_path, run_config):
    """MXFP4 blocks are no weights that could be quantised again."""
    folder, _ = saved("gpt_oss", tmp_path / "gpt_oss")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(UserError, match="quantised with 'mxfp4'"):
        begin(run_config(folder, load_in_4bit=True))


@pytest.mark.parametrize("part", ["absmax", "nested_absmax", "nested_offset", "quant_state.bitsandbytes__nf4"])
@pytest.mark.parametrize("wrong", ["missing", "short"])
def test_incomplete_states_of_experts_are_refused(tmp_path, run_config, part, wrong, capsys):
    """Codes without their scales are noise."""
    folder, _ = saved("granitemoe", tmp_path / "granite")
    assert main(["quantize", str(folder), str(tmp_path / "out")]) == 0
    assert "transformers does not read experts in 4 bits" in capsys.readouterr().out
    file = tmp_path / "out" / SINGLE_NAME
    tensors = load_file(file)
    name = f"model.layers.1.block_sparse_moe.experts.down_proj.{part}"
    if wrong == "missing":
        tensors.pop(name)
    else:
        tensors[name] = tensors[name][1:].clone()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layers\.1.*experts\.down_proj"):
        begin(run_config(tmp_path / "out"))
