"""`adalora-scale export` to PEFT's forms: PEFT computes what the live adapter computes."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.cli import main
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.peft_adalora import load_adapter, save_adapter
from tests.export.adapters import (
    KINDS,
    assert_same_function,
    base_folder,
    edit_json,
    export,
    load,
    logits,
    taken,
    trained,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*invalid shape"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match"),
]
FORMS = {"adalora": ["peft-adalora"], "lora": ["peft-lora"], "uniform": ["peft-lora", "--uniform"]}


@pytest.mark.shows(
    "exports",
    form=("peft-adalora", "peft-lora", "peft-lora --uniform"),
    of=lambda given: taken(given["kind"]),
)
@pytest.mark.parametrize("kind", KINDS)
def test_peft_computes_the_live_adapters_logits_from_every_form(request, tmp_path, capsys, kind):
    """The forms' whole purpose: a scale by the wrong rank, a lost head or a shuffled pattern shows only here."""
    base = base_folder(kind, tmp_path, request)
    expected = logits(trained(base, kind, tmp_path / "run"))
    ranks = {name: shape.rank for name, shape in AdapterFile(tmp_path / "run").modules.items()}
    assert len(set(ranks.values())) > 1
    for name, form in FORMS.items():
        report = export(tmp_path / "run", tmp_path / name, "--base", base, "--format", *form, capsys=capsys)
        got = peft.PeftModel.from_pretrained(load(base, kind), tmp_path / name)
        assert_same_function(got, expected, load(base, kind))
        assert report["fidelity"]["relative"] <= 1e-5
        assert report["fidelity"]["adapter_effect"] > 100 * report["fidelity"]["largest_difference"]
        assert json.loads((tmp_path / name / "export.json").read_text()) == report
    kept = {name: rank for name, rank in ranks.items() if rank}
    assert {name: s.rank for name, s in AdapterFile(tmp_path / "lora").modules.items()} == kept
    uniform = AdapterFile(tmp_path / "uniform")
    assert {s.rank for s in uniform.modules.values()} == {max(ranks.values())}
    assert uniform.modules.keys() == ranks.keys()
    assert uniform.config["rank_pattern"] == uniform.config["alpha_pattern"] == {}
    assert uniform.config["r"] == uniform.config["lora_alpha"]


def test_rank_0_and_names_that_end_others_stay_apart_in_peft(request, tmp_path):
    """PEFT takes a list of targets as name endings: a matrix without triplets must not get a random adapter by that."""
    base = base_folder("gpt2", tmp_path, request)
    model = trained(base, "gpt2", tmp_path / "run")
    names = [name for name, _ in adapter_layers(model)]
    for name in names[::3]:  # all triplets of every third matrix are pruned
        layer = model.get_submodule(name)
        layer.keep_mask = [False] * 4
        with torch.no_grad():
            layer.lora_E.zero_()
    save_adapter(model, tmp_path / "zero")
    report = {}
    for form in ("lora", "uniform"):
        export(tmp_path / "zero", tmp_path / form, "--base", base, "--format", *FORMS[form])
        got = peft.PeftModel.from_pretrained(load(base, "gpt2"), tmp_path / form)
        assert_same_function(got, logits(model), load(base, "gpt2"))
        report[form] = json.loads((tmp_path / form / "export.json").read_text())
    assert report["lora"]["left_out"] == names[::3]
    assert sorted(AdapterFile(tmp_path / "lora").modules) == sorted(set(names) - set(names[::3]))

    # "h.0.x" ends "deep.h.0.x": a list would give both the first one's target.
    tensors = {f"base_model.model.{name}.lora_{f}": torch.ones(s) for name in ("h.0.x", "deep.h.0.x")
               for f, s in (("A", (1, 2)), ("E", (1, 1)), ("B", (2, 1)))}  # fmt: skip
    tensors["base_model.model.deep.h.0.x.lora_A"] = torch.ones(2, 2)
    tensors["base_model.model.deep.h.0.x.lora_E"] = torch.ones(2, 1)
    tensors["base_model.model.deep.h.0.x.lora_B"] = torch.ones(2, 2)
    save_file(tensors, tmp_path / "run" / "adapter_model.safetensors")
    edit_json(tmp_path / "run" / "adapter_config.json", base_model_name_or_path=None)
    export(tmp_path / "run", tmp_path / "ends", "--format", "peft-lora", "--no-fidelity")
    config = json.loads((tmp_path / "ends" / "adapter_config.json").read_text())
    assert set(config["target_modules"].split("|")) == {r"h\.0\.x", r"deep\.h\.0\.x"}
    assert config["rank_pattern"] == {"^h.0.x": 1}
    assert {n: s.rank for n, s in AdapterFile(tmp_path / "ends").modules.items()} == {"h.0.x": 1, "deep.h.0.x": 2}


def test_uniform_takes_the_rank_a_server_wants(request, tmp_path, capsys):
    """vLLM is started with one max rank; an adapter of another rank may be refused there."""
    base = base_folder("gpt2", tmp_path, request)
    model = trained(base, "gpt2", tmp_path / "run")
    form = ["--format", "peft-lora", "--uniform", "--rank"]
    export(tmp_path / "run", tmp_path / "out", "--base", base, *form, 16)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.shape[0 if ".lora_A." in key else 1] for key, t in tensors.items()} == {16}
    assert_same_function(
        peft.PeftModel.from_pretrained(load(base, "gpt2"), tmp_path / "out"), logits(model), load(base, "gpt2")
    )
    assert main(["export", str(tmp_path / "run"), str(tmp_path / "no"), *map(str, [*form, 1])]) == 2
    assert "--rank 1 is smaller than the rank of 'transformer.h." in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("kind", ["stories260k", "bert"])
def test_exported_forms_are_read_here_too(request, tmp_path, kind):
    """PEFT's AdaLoRA divides by (r + 1e-5); the file compensates, and our own reader must take that back."""
    base = base_folder(kind, tmp_path, request)
    model = trained(base, kind, tmp_path / "run", steps=5)
    export(tmp_path / "run", tmp_path / "out", "--base", base, "--format", "peft-adalora")
    loaded = load_adapter(load(base, kind), tmp_path / "out")
    assert torch.allclose(logits(loaded), logits(model), rtol=0, atol=1e-6 * float(logits(model).abs().max()))
    again = AdapterFile(tmp_path / "out")
    export(tmp_path / "out", tmp_path / "twice", "--base", base, "--format", "peft-adalora")
    for name in again.modules:  # compensating twice would be wrong
        assert torch.equal(again.triplets(name).e, AdapterFile(tmp_path / "twice").triplets(name).e)


def test_adapter_without_its_base_is_exported_and_says_that_fidelity_was_not_measured(request, tmp_path, capsys):
    """Converting on a laptop must not need the 140 GB base."""
    base = base_folder("gpt2", tmp_path, request)
    trained(base, "gpt2", tmp_path / "run")
    edit_json(tmp_path / "run" / "adapter_config.json", base_model_name_or_path="/nowhere/else")
    report = export(tmp_path / "run", tmp_path / "out", "--format", "peft-lora", capsys=capsys)
    assert report["fidelity"] is None
    assert "base model is not at hand" in report["fidelity_text"]
    got = peft.PeftModel.from_pretrained(load(base, "gpt2"), tmp_path / "out")
    assert logits(got).isfinite().all()
