"""`adalora-scale export --format rank-pattern`: plain PEFT LoRA built from it trains exactly the learnt ranks."""

import json

import peft
import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.cli import main
from adalora_scale.config import AdaLoraConfig
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.peft_adalora import save_adapter
from tests.adalora import tiny
from tests.export.adapters import IDS, base_folder, edit_json, export, load, options, train, trained
from tests.export.test_inspection import write_checkpoint

FORM = ["--format", "rank-pattern"]


def deep():
    """Twelve layers: the names of layer 1 are beginnings of those of layers 10 and 11."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_layer=12, n_embd=16, n_head=2, vocab_size=64, n_positions=32))


def pruned_run(model, folder, ranks, **config):
    """Save an adapter whose matrices have `ranks` in turn, as after the final allocation."""
    inject_adalora(model, AdaLoraConfig(**{"init_r": 5, "target_r": 2, "lora_alpha": 8, **config}))
    tiny.randomise(model)
    with torch.no_grad():
        for index, (_, layer) in enumerate(adapter_layers(model)):
            layer.keep_mask = [k < ranks[index % len(ranks)] for k in range(layer.r)]
            layer.lora_E.mul_(torch.tensor(layer.keep_mask))
    save_adapter(model, folder)
    return {name: sum(layer.keep_mask) for name, layer in adapter_layers(model)}


def trains(config, model, ranks, scaling):
    """PEFT's model of the config has the ranks, one scaling, and not one parameter more."""
    got = peft.get_peft_model(model, config)
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in got.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    assert {name: layer.r["default"] for name, layer in layers.items()} == {n: r for n, r in ranks.items() if r}
    assert [layer.scaling["default"] for layer in layers.values()] == pytest.approx([scaling] * len(layers), rel=1e-12)
    expected = sum(layer.r["default"] * (layer.in_features + layer.out_features) for layer in layers.values())
    trainable = sum(p.numel() for n, p in got.named_parameters() if p.requires_grad and "lora_" in n)
    assert trainable == expected
    return expected


@pytest.mark.shows("exports", form="rank-pattern", of="AdaLoRA of a language model")
@pytest.mark.parametrize("alpha", [8, 10])
def test_peft_trains_the_learnt_ranks_at_the_runs_scale(tmp_path, capsys, alpha):
    """Else the pattern that is trained is not the one that was learnt: PEFT matches names by their endings."""
    deep().save_pretrained(tmp_path / "base")
    ranks = pruned_run(deep(), tmp_path / "run", [3, 0, 5, 1, 2, 2, 4], lora_alpha=alpha)
    assert ranks["transformer.h.1.attn.c_attn"] != ranks["transformer.h.11.attn.c_attn"]
    report = export(tmp_path / "run", tmp_path / "out", *FORM, "--base", tmp_path / "base", capsys=capsys)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["adapter_config.json", "export.json"]
    config = peft.LoraConfig.from_pretrained(tmp_path / "out")
    assert isinstance(config, peft.LoraConfig) and not config.inference_mode
    assert trains(config, deep(), ranks, alpha / 2) == report["parameters"]
    left_out = [name for name, rank in ranks.items() if rank == 0]
    assert report["left_out"] == left_out and len(left_out) > 5
    assert all(any(name in note for note in report["notes"]) for name in left_out)
    assert report["scalings"] == dict.fromkeys(report["ranks"], alpha / 2)
    assert report["fidelity"] is None and "no weights" in report["fidelity_text"]
    # One training step from scratch: every factor of B gets a gradient.
    model = peft.get_peft_model(load(tmp_path / "base", "gpt2"), peft.LoraConfig.from_pretrained(tmp_path / "out"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().max() > 0 for n, p in model.named_parameters() if "lora_B" in n)


class Twice(nn.Module):
    """`0.x` ends `deep.0.x`, and `deep.1.x` ends nothing."""

    def __init__(self):
        super().__init__()
        self.add_module("0", nn.ModuleDict({"x": nn.Linear(4, 6), "y": nn.Linear(4, 6)}))
        self.deep = nn.ModuleList([nn.ModuleDict({"x": nn.Linear(4, 6)}) for _ in range(2)])


@pytest.mark.parametrize("ranks", [[3, 1, 2, 2], [3, 1, 0, 2], [2, 1, 5, 0]])
def test_names_that_end_others_stay_apart(tmp_path, ranks):
    """Else a matrix of rank 0, or of another rank, is trained with its namesake's."""
    found = pruned_run(Twice(), tmp_path / "run", ranks, target_modules=["x", "y"])
    export(tmp_path / "run", tmp_path / "out", *FORM)
    trains(peft.LoraConfig.from_pretrained(tmp_path / "out"), Twice(), found, 8 / 2)


def test_a_namesake_that_only_the_base_has_is_not_trained(tmp_path):
    """Else LoRA trains modules that the run excluded: they are not in the adapter, only in the base."""
    from adalora_scale.export.rank_pattern import write_rank_pattern

    found = pruned_run(Twice(), tmp_path / "run", [2], target_modules=["0.x"], exclude_modules=["deep.0.x"])
    assert list(found) == ["0.x"]
    names = [name for name, _ in Twice().named_modules()]
    (tmp_path / "out").mkdir()
    write_rank_pattern(AdapterFile(tmp_path / "run"), tmp_path / "out", base=None, names=names)
    trains(peft.LoraConfig.from_pretrained(tmp_path / "out"), Twice(), found, 8 / 2)


def test_a_namesake_that_pruning_emptied_is_not_trained(tmp_path, capsys):
    """Else LoRA trains a matrix that lost all its triplets: the pruned plain LoRA does not name it any more."""
    config = peft.LoraConfig(r=2, target_modules=["x", "y"], init_lora_weights=False)
    model = peft.get_peft_model(Twice(), config)
    for name, parameter in model.named_parameters():
        if "deep.0.x.lora" in name:
            parameter.data.mul_(1e-3)
    model.save_pretrained(tmp_path / "run")
    report = export(tmp_path / "run", tmp_path / "out", *FORM, "--prune-to", 60, capsys=capsys)
    ranks = report["pruning"]["kept"]
    assert ranks["deep.0.x"] == 0 < ranks["0.x"] and "deep.0.x" in report["left_out"]
    trains(peft.LoraConfig.from_pretrained(tmp_path / "out"), Twice(), ranks, 8 / 2)


@pytest.mark.shows("exports", form="rank-pattern", of="AdaLoRA of a classifier")
def test_heads_and_peft_s_own_scale_go_along(request, tmp_path, capsys):
    """A head is trained in full by plain LoRA too; a file made for PEFT, with λ raised, still has the run's scale."""
    base = base_folder("bert", tmp_path, request)
    trained(base, "bert", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "adalora", "--base", base, "--format", "peft-adalora")
    for source in ("run", "adalora"):
        report = export(tmp_path / source, tmp_path / f"of-{source}", *FORM, "--base", base, capsys=capsys)
        assert set(report["scalings"].values()) == {2.0}
        config = json.loads((tmp_path / f"of-{source}" / "adapter_config.json").read_text())
        assert config["lora_alpha"] == 2 * config["r"] and isinstance(config["lora_alpha"], int)
        model = peft.get_peft_model(load(base, "bert"), peft.LoraConfig.from_pretrained(tmp_path / f"of-{source}"))
        heads = [n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n]
        assert heads and all("classifier.modules_to_save" in name for name in heads)


@pytest.mark.shows("exports", form="rank-pattern", of="checkpoint-N")
@pytest.mark.parametrize("steps", [6, 12])
def test_a_checkpoint_gives_its_pattern_once_it_is_settled(request, tmp_path, capsys, steps):
    """Before the final allocation a checkpoint stores init_r triplets of every matrix: no pattern was learnt yet."""
    base, config = base_folder("gpt2", tmp_path, request), options("gpt2")
    torch.manual_seed(0)
    model = inject_adalora(load(base, "gpt2"), config)

    allocator = train(model, "gpt2", config, steps=steps)
    folder = tmp_path / f"checkpoint-{steps}"
    write_checkpoint(model, allocator, folder, base, frozen=steps == 12)
    if steps == 12:
        report = export(folder, tmp_path / "out", *FORM, capsys=capsys)
        assert report["ranks"] == {name: rank for name, rank in allocator.ranks().items() if rank}
        return
    assert main(["export", str(folder), str(tmp_path / "out"), *FORM]) == 2
    assert "before the final allocation" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    report = export(folder, tmp_path / "out", *FORM, "--prune-to", "50%", capsys=capsys)
    assert report["ranks"] == {name: rank for name, rank in report["pruning"]["kept"].items() if rank}


def test_lora_whose_scale_is_not_a_runs_is_said(request, tmp_path, capsys):
    """λ and the scale are folded into our plain LoRA; LoRA of others may have a scale for every matrix."""
    base = base_folder("gpt2", tmp_path, request)
    trained(base, "gpt2", tmp_path / "run")
    export(tmp_path / "run", tmp_path / "lora", "--base", base, "--format", "peft-lora")
    report = export(tmp_path / "lora", tmp_path / "out", *FORM, capsys=capsys)
    assert any("its scale is not the run's" in note for note in report["notes"])
    path = tmp_path / "lora" / "adapter_config.json"
    edit_json(path, alpha_pattern={"c_attn": 16})
    report = export(tmp_path / "lora", tmp_path / "other", *FORM, capsys=capsys)
    assert any("different scalings" in note for note in report["notes"])
    assert {name: s.rank for name, s in AdapterFile(tmp_path / "lora").modules.items()} == report["ranks"]
    assert main(["export", str(tmp_path / "lora"), str(tmp_path / "no"), *FORM, "--fidelity"]) == 2
    assert "--fidelity compares logits" in capsys.readouterr().err
