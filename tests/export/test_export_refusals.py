"""Foreign, untrusted and damaged adapters and bases, taken folders, full disks: one line, and nothing is written."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from adalora_scale.cli import main
from adalora_scale.export import output
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.peft_adalora import load_adapter
from tests.conftest import ROOT
from tests.export.adapters import base_and_run, copy, edit_json, export, load, one_error_line

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
KEY = "base_model.model.transformer.h.0.attn.c_attn.lora_"


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """A base and an adapter that fit each other."""
    return base_and_run("gpt2", tmp_path_factory.mktemp("made"), request)


@pytest.fixture
def own(made, tmp_path):
    """Copies that a test may damage."""
    return copy(made[0], tmp_path / "base"), copy(made[1], tmp_path / "run")


def refused(capsys, run, out, *arguments) -> str:
    """Run an export that must fail, and return its one line."""
    before = sorted(path.name for path in out.parent.iterdir())
    said = one_error_line(capsys, lambda: main(["export", str(run), str(out), *map(str, arguments)]))
    assert sorted(path.name for path in out.parent.iterdir()) == before
    return said


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def leave_a_pickle(folder, name):
    (folder / name).write_bytes(pickle.dumps(Bomb()))


DAMAGE = {
    "truncated": (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-64]), "damaged"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "no config": (lambda f: (f / CONFIG).unlink(), f"no {CONFIG}"),
    "another method": (lambda f: edit_json(f / CONFIG, peft_type="IA3"), "'IA3'"),
    "DoRA": (lambda f: edit_json(f / CONFIG, use_dora=True), "use_dora"),
    "biases": (lambda f: edit_json(f / CONFIG, bias="all"), "bias=all"),
    "alpha": (lambda f: edit_json(f / CONFIG, lora_alpha="x"), "lora_alpha"),
    "not a number": (
        lambda f: edit_weights(f, lambda t: t[KEY + "E"].fill_(float("nan"))), "c_attn' is not finite"
    ),
    "a factor of another rank": (
        lambda f: edit_weights(f, lambda t: t.update({KEY + "A": torch.ones(7, 32)})), "factors"
    ),
    "a factor is missing": (lambda f: edit_weights(f, lambda t: t.pop(KEY + "B")), "no complete triplets"),
    "not an adapter's tensor": (
        lambda f: edit_weights(f, lambda t: t.update({KEY + "magnitude_vector": torch.ones(2)})), "magnitude_vector"
    ),
    "integers": (
        lambda f: edit_weights(f, lambda t: t.update({KEY + "A": t[KEY + "A"].to(torch.int32)})), "floating point"
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ["peft-lora", "merged"])
@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_adapter_is_refused_by_name(own, tmp_path, capsys, name, form):
    """A traceback of safetensors does not say what to do, and half an update is worse than none."""
    base, run = own
    damage, message = DAMAGE[name]
    damage(run)
    assert message in refused(capsys, run, tmp_path / "out", "--base", base, "--format", form)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_pickled_adapter_is_not_opened(own, tmp_path, capsys, name, monkeypatch):
    """Opening a pickle runs code; this one would leave a file."""
    base, run = own
    (run / WEIGHTS).unlink()
    leave_a_pickle(run, name)
    monkeypatch.chdir(tmp_path)
    for form in ("peft-lora", "merged", "peft-adalora"):
        error = refused(capsys, run, tmp_path / "out", "--base", base, "--format", form)
        assert name in error and "pickle" in error
    assert main(["inspect", str(run)]) == 2
    with pytest.raises(ValueError, match="pickle"):
        load_adapter(load(base, "gpt2"), run)
    assert not (tmp_path / "exploded").exists()


def test_pickled_base_is_not_opened(own, tmp_path, capsys, monkeypatch):
    """The same for pytorch_model.bin."""
    base, run = own
    (base / "model.safetensors").unlink()
    leave_a_pickle(base, "pytorch_model.bin")
    monkeypatch.chdir(tmp_path)
    assert "pickled" in refused(capsys, run, tmp_path / "out", "--base", base, "--format", "merged")
    assert not (tmp_path / "exploded").exists()


def test_no_file_of_this_room_unpickles():
    """torch.load in any of them would undo the two tests above for some path they do not take."""
    for path in (ROOT / "adalora_scale" / "export").glob("*.py"):
        text = path.read_text()
        assert "torch.load" not in text and "import pickle" not in text, path


def other_bases(base, folder):
    """Another shape, fewer layers, other weights in an adapted layer, other weights elsewhere."""
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"n_head": 2, "vocab_size": 64, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=64, **shape)).save_pretrained(folder / "wide")
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, **shape)).save_pretrained(folder / "short")
    for name, change in (
        ("finetuned", lambda m: m.transformer.h[1].mlp.c_proj.weight.data.add_(1e-3)),
        ("embedding", lambda m: m.transformer.wte.weight.data.mul_(1.01)),
        ("norms", lambda m: m.transformer.ln_f.weight.data.mul_(1.01)),
    ):
        model = load(base, "gpt2")
        change(model)
        model.save_pretrained(folder / name)
    return {
        "wide": "c_attn'",
        "short": "'transformer.h.1.",
        "finetuned": "weights differ",
        "embedding": "weights differ",
        "norms": "weights differ",
    }


def test_adapter_of_another_base_is_refused(own, tmp_path, capsys):
    """By shape where shapes differ, by fingerprint where only weights do: Llama and Llama-Instruct have one shape."""
    base, run = own
    for name, message in other_bases(base, tmp_path).items():
        for form in ("merged", "peft-lora"):
            assert message in refused(capsys, run, tmp_path / "out", "--base", tmp_path / name, "--format", form)
        with pytest.raises(ValueError, match=message.replace("'", "")):
            load_adapter(load(tmp_path / name, "gpt2"), run)
    half = tmp_path / "half"  # the same base in another precision is the same base
    load(base, "gpt2").to(torch.bfloat16).save_pretrained(half)
    export(run, tmp_path / "out", "--base", half, "--format", "merged")
    load_adapter(load(half, "gpt2"), run)
    load_adapter(load(half, "gpt2", dtype=torch.bfloat16), run)
    load_adapter(load(base, "gpt2", dtype=torch.float16), run)


def test_adapter_without_a_record_is_checked_by_shape(own, tmp_path, capsys):
    """Adapters that PEFT wrote have no fingerprint; they must still load."""
    base, run = own
    save_file(load_file(run / WEIGHTS), run / WEIGHTS)
    assert AdapterFile(run).record == {}
    export(run, tmp_path / "out", "--base", base, "--format", "merged")


BASES = {
    "truncated shard": (lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:-9]),
                        "damaged or truncated"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "no model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json cannot be read"),
    "config no JSON": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "missing shard": (lambda f: split(f).unlink(), "model-00002-of-00002.safetensors"),
}  # fmt: skip


def split(folder):
    """Turn a checkpoint into two shards and return the second."""
    tensors = load_file(folder / "model.safetensors")
    names = list(tensors)
    index = {}
    for number, part in ((1, names[::2]), (2, names[1::2])):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder / file


@pytest.mark.parametrize("name", BASES)
def test_damaged_base_is_refused_by_name(own, tmp_path, capsys, name):
    """A missing shard found after an hour of writing is too late."""
    base, run = own
    damage, message = BASES[name]
    damage(base)
    assert message in refused(capsys, run, tmp_path / "out", "--base", base, "--format", "merged")


@pytest.mark.parametrize("name", ["wte.weight", "h.0.attn.c_attn.weight", "ln_f.bias"])
def test_base_that_is_not_finite_is_named(own, tmp_path, capsys, name):
    """A merged model answers NaN to everything; its adapter is not to blame, and no wider dtype helps."""
    base, run = own
    tensors = load_file(base / "model.safetensors")
    key = next(key for key in tensors if key.endswith(name))
    tensors[key].view(-1)[5] = float("nan")  # the fingerprint of the base has not seen it
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    said = refused(capsys, run, tmp_path / "out", "--base", base, "--format", "merged")
    assert f"'{key.removesuffix('.weight')}" in said and "of the base model has values that are not finite" in said


@pytest.mark.parametrize("form", ["peft-adalora", "peft-lora"])
def test_adapter_that_is_not_finite_is_not_copied_on(own, tmp_path, capsys, form):
    """Neither its triplets nor a module that was trained in full."""
    _, run = own
    edit_weights(run, lambda tensors: tensors[KEY + "B"].view(-1)[:1].fill_(float("nan")))
    assert "not finite" in refused(capsys, run, tmp_path / "out", "--format", form)


def test_base_that_is_nowhere_is_said(own, tmp_path, capsys):
    """Merging needs it; the name in the adapter may be another machine's path."""
    _, run = own
    edit_json(run / CONFIG, base_model_name_or_path=str(tmp_path / "gone" / "away"))
    assert "say where it is with --base" in refused(capsys, run, tmp_path / "out", "--format", "merged")
    edit_json(run / CONFIG, base_model_name_or_path=None)
    assert "does not name its base" in refused(capsys, run, tmp_path / "out", "--format", "merged")


def test_options_that_do_not_belong_together_are_refused(own, tmp_path, capsys):
    """Ignoring one of them would give something else than what was asked for."""
    _, run = own
    for arguments, message in (
        (["--format", "merged", "--uniform"], "--uniform belongs to"),
        (["--format", "peft-lora", "--rank", "4"], "--rank belongs to --uniform"),
        (["--format", "peft-lora", "--uniform", "--rank", "0"], "at least 1"),
        (["--format", "peft-lora", "--dequantise"], "--dequantise belongs to"),
        (["--format", "merged", "--max-shard-size", "huge"], "--max-shard-size huge"),
        (["--format", "peft-lora", "--text", "/nowhere.txt", "--fidelity"], "/nowhere.txt"),
    ):
        assert message in refused(capsys, run, tmp_path / "out", *arguments)


def test_taken_folders_are_left_alone(own, tmp_path, capsys):
    """--overwrite replaces exports, never a home directory and never what is read."""
    base, run = own
    out = tmp_path / "out"
    form = ["--base", base, "--format", "merged", "--no-fidelity"]
    out.mkdir()
    export(run, out, *form)  # an empty folder is no reason to refuse
    first = (out / "model.safetensors").read_bytes()
    assert "pass --overwrite" in refused(capsys, run, out, *form)
    export(run, out, "--base", base, "--format", "peft-lora", "--overwrite", "--no-fidelity")
    assert sorted(p.name for p in out.iterdir()) == sorted([CONFIG, WEIGHTS, "README.md", "export.json"])
    export(run, out, *form, "--overwrite")
    assert (out / "model.safetensors").read_bytes() == first
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").touch()
    assert "leaves it alone" in refused(capsys, run, foreign, *form, "--overwrite")
    for target in (run, base):
        assert "would delete" in refused(capsys, run, target, *form, "--overwrite")
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in refused(capsys, run, file, *form)


def test_disk_that_is_too_small_is_said_before_writing(own, tmp_path, capsys, monkeypatch):
    """140 GB take an hour to write; the room is known beforehand."""
    base, run = own
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(output.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "the disk has 1,000 left" in refused(capsys, run, tmp_path / "out", "--base", base, "--format", "merged")


def test_full_disk_while_writing_leaves_nothing(own, tmp_path, capsys):
    """A real limit on file size: the write itself fails, in the middle of a tensor."""
    base, run = own
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "from adalora_scale.cli import main; import adalora_scale.export.exporting;"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["export", run, tmp_path / "out", "--base", base, "--format", "merged"]
    before = sorted(path.name for path in tmp_path.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2, done.stderr
    assert "File too large" in done.stderr and "Nothing was left behind" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_interrupted_overwrite_keeps_the_old_export(own, tmp_path, monkeypatch):
    """Ctrl-C in the middle of a merge must not cost the model that is being served."""
    from adalora_scale.export import exporting

    base, run = own
    form = ["--base", base, "--format", "merged", "--no-fidelity"]
    export(run, tmp_path / "out", *form)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    real = exporting.write_model

    def interrupted(*arguments, **options):
        real(*arguments, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "write_model", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out", *form, "--overwrite")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "out", "run"]
