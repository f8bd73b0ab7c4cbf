"""Merged models: plain transformers computes what the live adapter computes, for the odd architectures too."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    ProphetNetConfig,
    ProphetNetForCausalLM,
)

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import AdaLoraConfig
from adalora_scale.export.base_checkpoint import BaseCheckpoint
from adalora_scale.export.peft_adalora import save_adapter
from adalora_scale.tasks.registry import task_of_peft
from tests.adalora import tiny
from tests.export.adapters import (
    KINDS,
    LABELS,
    assert_same_function,
    base_folder,
    classifies,
    export,
    load,
    logits,
    options,
    taken,
    trained,
)

MERGED = ["--format", "merged", "--base"]


@pytest.mark.shows("exports", form="merged", of=lambda given: taken(given["kind"]))
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_plain_transformers_loads_the_merged_model_with_the_live_adapters_logits(
    request, tmp_path, capsys, kind, shard
):
    """A transposed Conv1D, a lost shard, head or prefix shows here; so does a class that loads with a random head."""
    base = base_folder(kind, tmp_path, request)
    expected = logits(trained(base, kind, tmp_path / "run"))
    out = tmp_path / "out"
    report = export(tmp_path / "run", out, *MERGED, base, "--max-shard-size", shard, capsys=capsys)
    factory = AutoModelForSequenceClassification if classifies(kind) else AutoModelForCausalLM
    model, info = factory.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert type(model) is type(load(base, kind))
    assert_same_function(model, expected, load(base, kind))
    assert report["fidelity"]["relative"] <= 1e-5
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert (out / "model.safetensors.index.json").is_file() == (len(files) > 1) == (shard == "30KB")
    assert files[0] == ("model.safetensors" if shard == "5GB" else f"model-00001-of-{len(files):05d}.safetensors")
    config = json.loads((out / "config.json").read_text())
    assert config["architectures"] == [type(model).__name__]
    if classifies(kind):
        assert [model.config.id2label[i] for i in range(3)] == LABELS
    if kind in ("stories260k", "minilm"):
        text = "Once upon a time"
        assert AutoTokenizer.from_pretrained(out)(text).input_ids == AutoTokenizer.from_pretrained(base)(text).input_ids
    if kind == "stories260k":
        assert json.loads((out / "generation_config.json").read_text())


def test_untouched_tensors_are_the_bases_bytes_and_the_sum_is_rounded_once(request, tmp_path):
    """bfloat16 bases: W + ΔW is summed in float32; adding in bfloat16 rounds ΔW away."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(request.getfixturevalue("stories260k"), dtype=torch.bfloat16).save_pretrained(
        base
    )
    model = trained(base, "stories260k", tmp_path / "run", target_modules=["q_proj", "down_proj"])
    export(tmp_path / "run", tmp_path / "out", *MERGED, base)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    adapted = 0
    for name, weight in before.items():
        assert after[name].dtype == torch.bfloat16
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            layer = model.get_submodule(name.removesuffix(".weight"))
            delta = layer.delta_weight()
            adapted += bool(delta.any())
            torch.testing.assert_close(after[name], (weight.float() + delta).bfloat16(), rtol=0, atol=2e-6)
        else:
            assert torch.equal(after[name], weight)
    assert adapted > 2


def test_tied_head_with_an_adapter_is_untied(tmp_path, request):
    """Adding the head's ΔW to the shared tensor would change the embeddings too."""
    base = base_folder("gpt2", tmp_path, request)
    torch.manual_seed(0)
    model = load(base, "gpt2")
    inject_adalora(model, options("gpt2", target_modules=["lm_head", "c_attn"]))
    tiny.randomise(model, std=0.1)
    save_adapter(model, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", *MERGED, base)
    merged = load(tmp_path / "out", "gpt2")
    assert_same_function(merged, logits(model), load(base, "gpt2"))
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.transformer.wte.weight, load(base, "gpt2").transformer.wte.weight)


def test_embedding_trained_in_full_stays_tied(tmp_path, request):
    """The head shares it, so replacing it replaces both, as in training."""
    base = base_folder("gpt2", tmp_path, request)
    model = trained(base, "gpt2", tmp_path / "run", modules_to_save=["wte"])
    export(tmp_path / "run", tmp_path / "out", *MERGED, base)
    merged = load(tmp_path / "out", "gpt2")
    assert_same_function(merged, logits(model), load(base, "gpt2"))
    assert merged.lm_head.weight is merged.transformer.wte.weight
    assert not torch.equal(merged.transformer.wte.weight, load(base, "gpt2").transformer.wte.weight)


def mixtral_adapter(tmp_path, **changes):
    """Checkpoints have one tensor an expert, transformers merges them while loading."""
    tiny.mixtral().save_pretrained(tmp_path / "base")
    names = load_file(tmp_path / "base" / "model.safetensors")
    assert any("experts.0." in name for name in names)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    inject_adalora(model, AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, **changes))
    tiny.randomise(model, std=0.2)
    save_adapter(model, tmp_path / "run")
    return model, names


def test_converted_architecture_keeps_the_checkpoints_own_names(tmp_path):
    """Experts are written as they were read: the model's merged 3-D tensors would load nowhere else."""
    model, names = mixtral_adapter(tmp_path, target_modules=["q_proj", "o_proj"])
    export(tmp_path / "run", tmp_path / "out", *MERGED, tmp_path / "base")
    assert load_file(tmp_path / "out" / "model.safetensors").keys() == names.keys()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    assert_same_function(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), logits(model), base)


def test_renamed_architecture_is_merged_under_the_old_names(tmp_path, request):
    """Old BERT checkpoints say gamma and beta, and models from a bare encoder lack the prefix."""
    base = base_folder("bert", tmp_path, request)
    tensors = load_file(base / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }
    assert old.keys() != tensors.keys()
    save_file(old, base / "model.safetensors", metadata={"format": "pt"})
    expected = logits(trained(base, "bert", tmp_path / "run"))
    export(tmp_path / "run", tmp_path / "out", *MERGED, base)
    merged = load_file(tmp_path / "out" / "model.safetensors")
    assert set(old) < set(merged) and "classifier.weight" in merged
    assert_same_function(load(tmp_path / "out", "bert"), expected, load(base, "bert"))


def test_weight_that_transformers_converts_is_refused_by_name(tmp_path, capsys, monkeypatch):
    """Its ΔW has no place in the checkpoint; writing it anywhere would be wrong."""
    from transformers.conversion_mapping import register_checkpoint_conversion_mapping
    from transformers.core_model_loading import Chunk, WeightConverter

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=64, max_position_embeddings=32, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    tensors = load_file(path)
    prefix = "model.layers.0.self_attn."
    parts = [tensors.pop(f"{prefix}{name}_proj.weight") for name in "qkv"]
    save_file({**tensors, f"{prefix}qkv.weight": torch.cat(parts)}, path, metadata={"format": "pt"})
    targets = [f"self_attn.{name}_proj.weight" for name in "qkv"]
    converter = WeightConverter("self_attn.qkv.weight", targets, [Chunk(dim=0)])
    register_checkpoint_conversion_mapping("LlamaForCausalLM", [converter], overwrite=True)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        assert torch.equal(logits(loaded), logits(model))
        for name, code in (("down_proj", 0), ("q_proj", 2), ("v_proj", 2)):
            inject_adalora(adapted := AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval(),
                           AdaLoraConfig(init_r=2, target_r=1, target_modules=[name]))  # fmt: skip
            tiny.randomise(adapted)
            save_adapter(adapted, tmp_path / name)
            arguments = ["export", tmp_path / name, tmp_path / f"out-{name}", *MERGED, tmp_path / "base"]
            assert main(list(map(str, arguments))) == code
            if code:
                error = capsys.readouterr().err
                assert f"{prefix}{name}" in error and "qkv.weight" in error and "merge_and_unload" in error
            else:
                merged = AutoModelForCausalLM.from_pretrained(tmp_path / f"out-{name}")
                assert_same_function(merged, logits(adapted), loaded)
    finally:
        import transformers.conversion_mapping as mapping

        mapping._checkpoint_conversion_mapping_cache.pop("LlamaForCausalLM")
        mapping.USER_REGISTERED_MAPPINGS.discard("LlamaForCausalLM")


def test_decoder_that_classifies_knows_its_padding_and_leaves_the_old_head(request, tmp_path):
    """LlamaForSequenceClassification looks for the last token before the padding; its base has an lm_head."""
    base = tmp_path / "base"
    model = AutoModelForCausalLM.from_pretrained(request.getfixturevalue("stories260k"))
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.save_pretrained(base)
    AutoTokenizer.from_pretrained(request.getfixturevalue("stories260k")).save_pretrained(base)
    config = json.loads((base / "config.json").read_text())
    config.pop("pad_token_id")
    (base / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    live = AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).eval()
    live.config.pad_token_id = AutoTokenizer.from_pretrained(base).pad_token_id
    inject_adalora(live, options("bert", modules_to_save=["score"]))
    tiny.randomise(live, std=0.1)
    save_adapter(live, tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", *MERGED, base, "--no-fidelity")
    merged, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert merged.config.pad_token_id == live.config.pad_token_id is not None
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, live.config.pad_token_id, live.config.pad_token_id]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, live(ids).logits, rtol=1e-5, atol=1e-5)


def test_weights_that_nobody_saved_are_refused(request, tmp_path, capsys):
    """A layer that was new and frozen in training is random: the merged model would get other random numbers."""
    base = base_folder("bert", tmp_path, request)
    path = base / "model.safetensors"
    tensors = load_file(path)
    for name in [name for name in tensors if name.startswith("pooler.")]:
        tensors.pop(name)
    save_file(tensors, path, metadata={"format": "pt"})
    for run, changes in (("adapted", {}), ("frozen", {"exclude_modules": ["pooler.dense"]})):
        trained(base, "bert", tmp_path / run, **changes)
        assert main(list(map(str, ["export", tmp_path / run, tmp_path / "out", *MERGED, base]))) == 2
        error = capsys.readouterr().err
        assert "'bert.pooler.dense.weight'" in error and "modules_to_save" in error
        assert not (tmp_path / "out").exists()


def test_sum_that_does_not_fit_the_dtype_is_refused(request, tmp_path, capsys):
    """Infinities in float16 would be served as NaN."""
    base = tmp_path / "base"
    load(base_folder("gpt2", tmp_path, request), "gpt2").to(torch.float16).save_pretrained(base)
    torch.manual_seed(0)
    model = inject_adalora(load(base, "gpt2"), options("gpt2"))
    tiny.randomise(model, std=100)
    save_adapter(model, tmp_path / "run")
    assert main(list(map(str, ["export", tmp_path / "run", tmp_path / "out", *MERGED, base]))) == 2
    assert "does not fit torch.float16" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir() if "out" in path.name) == []


@pytest.mark.shows("exports", form="merged", of="plain LoRA of PEFT")
def test_merging_plain_lora_works_too(request, tmp_path, capsys):
    """What was exported as LoRA can still be merged; PEFT's own merge is the comparison."""
    import peft

    base = base_folder("stories260k", tmp_path, request)
    trained(base, "stories260k", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "lora", "--base", base, "--format", "peft-lora")
    report = export(tmp_path / "lora", tmp_path / "out", *MERGED, base, capsys=capsys)
    theirs = peft.PeftModel.from_pretrained(load(base, "stories260k"), tmp_path / "lora").merge_and_unload()
    ours = load(tmp_path / "out", "stories260k").state_dict()
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-7)
    assert report["fidelity"]["relative"] <= 1e-5


def test_digests_agree_between_files_and_memory(request, tmp_path):
    """They are computed from single elements of the files at export and from the loaded model at training."""
    for kind in KINDS:
        base = base_folder(kind, tmp_path, request)
        model = load(base, kind)
        inject_adalora(model, options(kind))
        targets = [n.removesuffix(".lora_A") for n, _ in model.named_parameters() if n.endswith(".lora_A")]
        task = task_of_peft("SEQ_CLS" if classifies(kind) else "CAUSAL_LM")
        checkpoint = BaseCheckpoint(base, task=task, num_labels=3 if classifies(kind) else None)
        saved = ["classifier"] if classifies(kind) else []
        own = checkpoint.digests(targets, saved)
        assert own == model.adalora.base_digests and own.keys() == {"adapted", "rest"}
        assert "float32" in own["adapted"]
        half = load(base, kind, dtype=torch.bfloat16)
        inject_adalora(half, options(kind))
        assert half.adalora.base_digests["rest"]["bfloat16"] == own["rest"]["bfloat16"]
        assert half.adalora.base_digests["adapted"] == {"bfloat16": own["adapted"]["bfloat16"]}


def test_an_embedding_of_several_names_is_digested_under_the_first(tmp_path):
    """ProphetNet's parameter is `word_embeddings`, its embedding module the decoder's: its own base was refused."""
    sizes = {"hidden_size": 16, "vocab_size": 32, "max_position_embeddings": 16, "num_decoder_layers": 1}
    layers = {"decoder_ffn_dim": 16, "num_decoder_attention_heads": 2, "num_encoder_attention_heads": 2}
    ProphetNetForCausalLM(ProphetNetConfig(**sizes, **layers)).save_pretrained(tmp_path)
    model = ProphetNetForCausalLM.from_pretrained(tmp_path)
    inject_adalora(model, AdaLoraConfig(init_r=2, target_r=1, target_modules=["query_proj"]))
    targets = [name.removesuffix(".lora_A") for name, _ in model.named_parameters() if name.endswith(".lora_A")]
    own = BaseCheckpoint(tmp_path, task=task_of_peft("CAUSAL_LM"), num_labels=None).digests(targets, [])
    assert own == model.adalora.base_digests


def test_model_code_and_licences_travel_and_foreign_files_do_not(request, tmp_path):
    """Licences must go with derived weights; an index or optimizer of the base would mislead."""
    base = shutil.copytree(base_folder("gpt2", tmp_path, request), tmp_path / "base")
    for name in ("LICENSE", "NOTICE.md", "modeling_x.py", "trainer_state.json", "optimizer.pt"):
        (base / name).write_text("{}")
    trained(base, "gpt2", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "out", *MERGED, base)
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"LICENSE", "NOTICE.md", "modeling_x.py", "config.json", "export.json"} <= found
    assert not {"trainer_state.json", "optimizer.pt"} & found
    assert AutoConfig.from_pretrained(tmp_path / "out").model_type == "gpt2"
