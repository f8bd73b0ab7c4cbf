"""`adalora-scale inspect`: the figures are those of the files, for adapters of every origin and for checkpoints."""

import dataclasses
import json

import peft
import pytest
import torch
from safetensors.torch import load_file

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.checkpoint.flat import Group, flat_tensors
from adalora_scale.checkpoint.format import Checkpoint, pieces_name, write_manifest, write_tensors
from adalora_scale.checkpoint.identity import require_same_run
from adalora_scale.cli import main
from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.from_checkpoint import adalora_options
from adalora_scale.export.inspection import rank_table
from adalora_scale.export.peft_adalora import save_adapter
from tests.adalora import tiny
from tests.export.adapters import LABELS, base_folder, export, load, options, train, trained
from tests.sizes import assert_spent


def inspected(capsys, folder) -> dict:
    capsys.readouterr()
    assert main(["inspect", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_figures_are_the_adapters(request, tmp_path, capsys):
    """Someone decides by them which adapter to serve."""
    base = base_folder("stories260k", tmp_path, request)
    model = trained(base, "stories260k", tmp_path / "run")
    found = inspected(capsys, tmp_path / "run")
    ranks = {name: sum(layer.keep_mask) for name, layer in adapter_layers(model)}
    triplets = sum(ranks.values())
    assert found["ranks"] == ranks and found["triplets"] == triplets
    assert_spent(ranks, 2)
    assert found["parameters"] == sum(t.numel() for t in load_file(tmp_path / "run/adapter_model.safetensors").values())
    assert (found["final"], found["base"], found["task_type"]) == (True, str(base), "CAUSAL_LM")
    assert found["schedule"]["total_step"] == 12 and found["schedule"]["final_allocation"] == 9
    assert main(["inspect", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    for word in (
        "ranks in model.layers",
        "gate_proj",
        f"{triplets} over 35 matrices",
        "final, allocated at step 9",
        str(base),
    ):
        assert word in text
    last = text.splitlines()[-1].split()
    assert last[0] == "sum" and int(last[-1]) == triplets == sum(map(int, last[1:-1]))


def test_adapter_from_before_its_end_shows_the_current_mask(request, tmp_path, capsys):
    """Its file holds every triplet; those that count have a λ."""
    base = base_folder("gpt2", tmp_path, request)
    config = options("gpt2")
    torch.manual_seed(0)
    model = inject_adalora(load(base, "gpt2"), config)
    allocator = train(model, "gpt2", config, steps=6)
    save_adapter(model, tmp_path / "run")
    found = inspected(capsys, tmp_path / "run")
    assert not found["final"] and found["ranks"] == allocator.ranks()
    assert 16 < found["triplets"] < 32
    assert main(["inspect", str(tmp_path / "run")]) == 0
    assert "not final, the last allocation comes at step 9" in capsys.readouterr().out
    report = export(
        tmp_path / "run", tmp_path / "out", "--base", base, "--format", "peft-lora", "--no-fidelity", capsys=capsys
    )
    assert any("before the final allocation" in note for note in report["notes"])


@pytest.mark.parametrize("method", ["lora", "rslora", "adalora"])
def test_pefts_own_adapters_are_read(request, tmp_path, capsys, method):
    """Users bring adapters they have; their scale is PEFT's, which is what PEFT's merge gives."""
    base = base_folder("gpt2", tmp_path, request)
    names = ["c_attn", "c_fc"]
    torch.manual_seed(0)
    if method == "adalora":
        config = peft.AdaLoraConfig(
            init_r=4, target_r=2, lora_alpha=8, total_step=10, target_modules=names, fan_in_fan_out=True
        )
    else:
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=names, fan_in_fan_out=True, use_rslora=method == "rslora",
            init_lora_weights=False, **({"rank_pattern": {"c_fc": 2}, "alpha_pattern": {"h.0.mlp.c_fc": 5}}
                                        if method == "lora" else {}),
        )  # fmt: skip
    model = peft.get_peft_model(load(base, "gpt2"), config)
    for name, parameter in model.named_parameters():
        if "lora_E" in name:
            parameter.data.normal_()
    model.save_pretrained(tmp_path / "theirs")
    found = inspected(capsys, tmp_path / "theirs")
    assert found["kind"] == ("AdaLoRA adapter" if method == "adalora" else "plain LoRA adapter")
    assert set(found["ranks"].values()) == ({4, 2} if method == "lora" else {4})
    adapter = AdapterFile(tmp_path / "theirs")
    for name, shape in adapter.modules.items():
        layer = model.base_model.model.get_submodule(name)
        update = adapter.update(name)
        transposed = update.delta(0, shape.in_features, transposed=True)
        torch.testing.assert_close(transposed, layer.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(update.delta(0, shape.out_features, transposed=False).T, transposed)


def test_classes_and_fully_trained_modules_are_shown(request, tmp_path, capsys):
    """A classifier without its head is useless."""
    base = base_folder("bert", tmp_path, request)
    trained(base, "bert", tmp_path / "run")
    found = inspected(capsys, tmp_path / "run")
    assert found["labels"] == LABELS
    assert found["trained_in_full"] == {"classifier.bias": [3], "classifier.weight": [3, 32]}
    assert main(["inspect", str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "3 classes" in text and "99 in 2 tensors trained in full" in text and "attention.self.query" in text


def test_stacks_stand_apart_and_odd_names_have_a_place():
    """An encoder-decoder has two layers of every index."""
    text = rank_table({"encoder.block.0.wi": 1, "encoder.block.1.wi": 2, "decoder.block.0.wi": 30, "score": 4})
    blocks = [block.splitlines() for block in text.split("\n\n")]
    assert [block[0] for block in blocks] == ["ranks in encoder.block", "ranks in decoder.block", "ranks"]
    assert blocks[0][-1].split() == ["sum", "3", "3"] and blocks[1][-1].split() == ["sum", "30", "30"]
    assert blocks[2][-2].split() == ["–", "4", "4"]


def write_checkpoint(model, allocator, folder, base, *, frozen, without=()):
    """A checkpoint of two ranks, as training lays it out: flat intervals, split in the middle of every tensor."""
    folder.mkdir(parents=True)
    tensors = {f"{name}.{factor}": getattr(layer, factor).detach() for name, layer in adapter_layers(model)
               for factor in ("lora_A", "lora_E", "lora_B")}  # fmt: skip
    entries = {}
    for rank in range(2):
        group = Group(values={"weight": []})
        for name, tensor in tensors.items():
            half = tensor.numel() // 2
            start, stop = (0, half) if rank == 0 else (half, tensor.numel())
            group.intervals.append((name, start, stop - start))
            group.values["weight"].append(tensor.reshape(-1)[start:stop])
        names = {"adapter": list(tensors), "other": []}
        path = folder / pieces_name(rank, 2)
        entries[path.name] = write_tensors(path, flat_tensors({"adapter": group, "other": Group()}, names, {}))
    config = {
        f"adalora.{key}": value for key, value in dataclasses.asdict(allocator.config).items() if key not in without
    }
    masks = allocator.mask.view(-1, allocator.r).int().tolist()
    position = {"step": allocator.step, "total_step": 12, "budget": allocator.budget, "frozen": frozen, "init_r": 4}
    position["mask"] = {
        name: "".join(map(str, row)) for (name, _), row in zip(adapter_layers(model), masks, strict=True)
    }
    shapes = {"adapter": {name: list(tensor.shape) for name, tensor in tensors.items()}, "other": {}}
    content = {"step": allocator.step, "world_size": 2, "engine": "fsdp2", "allocator": position, "tensors": shapes}
    content |= {"identity": config | {"task": "causal_lm"}, "base_model": str(base), "files": entries}
    write_manifest(folder, content)


def test_a_checkpoint_from_before_a_key_has_the_value_of_its_time(request, tmp_path, capsys):
    """Else it is exported at today's scale, without a word; and a run that began otherwise would go on from it."""
    base = base_folder("gpt2", tmp_path, request)
    config = options("gpt2", init_weights="adalora", score="sensitivity_uncertainty", budget_unit="triplets")
    model = inject_adalora(load(base, "gpt2"), config)
    folder = tmp_path / "run" / "checkpoint-12"
    later = ("init_weights", "score", "budget_unit")
    write_checkpoint(model, train(model, "gpt2", config), folder, base, frozen=True, without=later)
    save_adapter(model, tmp_path / "run")
    assert inspected(capsys, folder)["lora_alpha"] == inspected(capsys, tmp_path / "run")["lora_alpha"] == 4
    options_then = adalora_options(Checkpoint(folder))
    assert (options_then.scaling, options_then.score) == (1.0, "sensitivity_uncertainty")
    with pytest.raises(UserError, match=r"adalora\.init_weights: adalora → lora"):
        require_same_run(Checkpoint(folder), {"adalora.init_weights": "lora"}, [])


@pytest.mark.parametrize("steps", [6, 12])
def test_checkpoint_is_inspected_and_exported_like_its_adapter(request, tmp_path, capsys, steps):
    """A run that was killed leaves checkpoints only; what it learnt must come out all the same."""
    base = base_folder("gpt2", tmp_path, request)
    config = options("gpt2")
    torch.manual_seed(0)
    model = inject_adalora(load(base, "gpt2"), config)
    allocator = train(model, "gpt2", config, steps=steps)
    save_adapter(model, tmp_path / "run")
    folder = tmp_path / "run" / f"checkpoint-{steps}"
    write_checkpoint(model, allocator, folder, base, frozen=steps == 12)
    found, adapter = inspected(capsys, folder), inspected(capsys, tmp_path / "run")
    same = ("ranks", "triplets", "final", "base", "init_r", "target_r", "lora_alpha")
    assert {key: found[key] for key in same} == {key: adapter[key] for key in same}
    assert found["schedule"]["step"] == steps and found["schedule"]["final_allocation"] == 9
    assert (found["engine"], found["world_size"]) == ("fsdp2", 2)
    assert found["bytes"] == sum(path.stat().st_size for path in folder.glob("pieces-*"))
    assert main(["inspect", str(folder)]) == 0
    assert f"step {steps} of 12" in capsys.readouterr().out
    for source, out in ((folder, "a"), (tmp_path / "run", "b")):
        export(source, tmp_path / out, "--base", base, "--format", "peft-lora", "--no-fidelity")
    one, two = (load_file(tmp_path / out / "adapter_model.safetensors") for out in ("a", "b"))
    assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one)
    pieces = next(folder.glob("pieces-00001*"))
    data = bytearray(pieces.read_bytes())
    data[len(data) // 2] ^= 1
    pieces.write_bytes(data)
    for command in (["inspect", str(folder)], ["export", str(folder), str(tmp_path / "c"), "--format", "peft-lora"]):
        assert main(command) == 2
        assert pieces.name in capsys.readouterr().err


def test_folders_that_hold_nothing_are_said(tmp_path, capsys):
    """A run's folder without an adapter may hold checkpoints; the error says which."""
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "manifest.json").touch()
    for folder, message in ((tmp_path, "(it holds checkpoint-3)"), (tmp_path / "none", "is not a folder")):
        assert main(["inspect", str(folder)]) == 2
        assert message in capsys.readouterr().err


def test_table_is_readable_without_a_model(capsys, tmp_path):
    """Fixed form: numbers line up, so that a column can be read down."""
    model = inject_adalora(tiny.gpt2(), options("gpt2"))
    text = rank_table({name: 3 + 9 * index for index, (name, _) in enumerate(adapter_layers(model))})
    assert len({len(line) for line in text.splitlines()[1:]}) == 1
