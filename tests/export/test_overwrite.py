"""`--overwrite` of `export` and `quantize` replaces what this tool wrote, as it was written, and nothing else."""

import json
import os
import subprocess
import sys

import pytest

from adalora_scale.cli import main
from tests.conftest import ROOT
from tests.export.adapters import base_and_run, copy, edit_json, export, one_error_line


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """A base, an adapter on it, and an export and a quantised model of them."""
    folder = tmp_path_factory.mktemp("made")
    base, run = base_and_run("stories260k", folder, request)
    export(run, folder / "export", "--base", base, "--format", "peft-lora", "--no-fidelity")
    assert main(["quantize", str(base), str(folder / "quantize")]) == 0
    return base, folder


@pytest.fixture(params=["export", "quantize"])
def verb(request, made, tmp_path):
    """A verb's call with --overwrite as a function of the target, and its earlier result at tmp_path/out."""
    base, folder = made
    copy(folder / request.param, tmp_path / "out")

    def call(out):
        if request.param == "quantize":
            return main(["quantize", str(base), str(out), "--overwrite"])
        form = ["--base", str(base), "--format", "peft-lora", "--no-fidelity"]
        return main(["export", str(folder / "run"), str(out), *form, "--overwrite"])

    return call


def everything(folder):
    """Name → content of all below a folder; links are what they point to, in words."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        found[name] = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    return found


def refused(capsys, call, out, *words):
    """The call ends with exit code 2 and one line that has the words, and nothing changes."""
    before = everything(out.parent)
    said = one_error_line(capsys, lambda: call(out))
    assert all(word in said for word in words), said
    assert everything(out.parent) == before


def test_what_the_tool_wrote_is_replaced(verb, tmp_path):
    """Else there is no way to write an export again."""
    old = os.stat(tmp_path / "out").st_ino
    before = everything(tmp_path / "out")
    assert verb(tmp_path / "out") == 0
    assert os.stat(tmp_path / "out").st_ino != old
    assert everything(tmp_path / "out").keys() == before.keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_record_lists_every_file(made):
    """What is not listed can never be replaced, what is listed and not there is a lie."""
    for name in ("export", "quantize"):
        folder = made[1] / name
        record = json.loads((folder / "export.json").read_text())
        assert record["tool"] == "adalora-scale" and record["tool_version"]
        files = {path.name: path.stat().st_size for path in folder.iterdir() if path.name != "export.json"}
        assert {key: entry["bytes"] for key, entry in record["written"].items()} == files


def test_a_file_that_came_in_later_is_not_deleted(verb, tmp_path, capsys):
    """Somebody's notes beside the weights went with them."""
    out = tmp_path / "out"
    (out / "thesis.tex").write_text("years of work")
    refused(capsys, verb, out, "thesis.tex", "leaves it alone", str(out))
    (out / "thesis.tex").unlink()
    (out / "figures").mkdir()
    refused(capsys, verb, out, "figures/")
    (out / "figures" / "a.png").touch()
    refused(capsys, verb, out, "figures/a.png")


def test_a_file_that_was_changed_is_not_deleted(verb, tmp_path, capsys):
    """Hand-tuned settings look like the file that was written, by name and by size."""
    out = tmp_path / "out"
    name = "adapter_config.json" if (out / "adapter_config.json").exists() else "config.json"
    text = (out / name).read_text()
    (out / name).write_text(text.replace("false", "true ", 1))
    assert len((out / name).read_text()) == len(text)
    refused(capsys, verb, out, name, "changed since it was written")


@pytest.mark.parametrize("marker", ["config.json", "adapter_config.json", "export.json"])
def test_a_folder_of_others_is_not_deleted(verb, tmp_path, capsys, marker):
    """Any project may have a config.json; a thesis went with one."""
    foreign = tmp_path / "work"
    foreign.mkdir()
    (foreign / marker).write_text("{}")
    (foreign / "thesis.tex").write_text("years of work")
    refused(capsys, verb, foreign, "leaves it alone", "Name another folder")


def test_a_run_with_its_checkpoints_is_not_deleted(verb, tmp_path, capsys):
    """A run's output_dir holds an adapter_config.json too, beside weeks of checkpoints."""
    run = tmp_path / "run"
    (run / "checkpoint-400").mkdir(parents=True)
    (run / "checkpoint-400" / "manifest.json").write_text("{}")
    for name in ("run.json", "adapter_config.json"):
        (run / name).write_text("{}")
    refused(capsys, verb, run, "is a run's output_dir")


def test_an_export_of_an_earlier_version_is_named_as_such(verb, tmp_path, capsys):
    """It has no list of its files: deleting by guess is what went wrong."""
    out = tmp_path / "out"
    record = json.loads((out / "export.json").read_text())
    for key in ("tool", "tool_version", "written"):
        del record[key]
    (out / "export.json").write_text(json.dumps(record))
    refused(capsys, verb, out, "earlier version", "does not list the files", "remove it by hand")


def test_links_are_never_followed(verb, tmp_path, capsys):
    """The link's other end may be the only copy of something, or another export that is being served."""
    elsewhere = tmp_path / "elsewhere"
    out = tmp_path / "out"
    copy(out, elsewhere / "served")
    link = elsewhere / "link"
    link.symlink_to(elsewhere / "served", target_is_directory=True)
    refused(capsys, verb, link, "is a link", "served")
    (out / "weights").symlink_to(elsewhere, target_is_directory=True)
    refused(capsys, verb, out, "weights")
    (out / "weights").unlink()
    name = next(name for name in everything(out) if name.endswith(".safetensors"))
    (out / name).rename(elsewhere / name)
    (out / name).symlink_to(elsewhere / name)
    refused(capsys, verb, out, name)


def test_names_in_a_forged_record_reach_no_file_outside(verb, tmp_path, capsys):
    """export.json is a file like any other: anyone may have written `../` into it."""
    precious = tmp_path / "precious"
    precious.write_text("keep")
    record = json.loads((tmp_path / "out" / "export.json").read_text())
    forged = record["written"] | {"../precious": {"bytes": 4}, str(precious): {"bytes": 4}}
    edit_json(tmp_path / "out" / "export.json", written=forged)
    assert verb(tmp_path / "out") == 0
    assert precious.read_text() == "keep"


def test_without_the_option_nothing_is_replaced(made, tmp_path, capsys):
    """And what the option would refuse is not recommended."""
    base, folder = made
    out = copy(folder / "quantize", tmp_path / "out")

    def call(target):
        return main(["quantize", str(base), str(target)])

    refused(capsys, call, out, "holds something already", "or pass --overwrite")
    (out / "notes").touch()
    refused(capsys, call, out, "holds something already", "notes")


def test_the_working_folder_is_not_pulled_away(verb, tmp_path, capsys, monkeypatch):
    """The shell would stand in a folder that is gone."""
    monkeypatch.chdir(tmp_path / "out")
    refused(capsys, verb, tmp_path / "out", "working folder")


@pytest.mark.parametrize("taken", [False, True])
def test_a_form_that_is_not_the_adapter_is_not_published(made, tmp_path, capsys, taken):
    """Exit code 1 does not help where the old export is gone and the wrong one stands in its place."""
    base, folder = made
    out = tmp_path / "out"
    if taken:
        copy(folder / "export", out)
    before = everything(tmp_path)
    code = (
        "import sys; from adalora_scale.export.fidelity import Fidelity; from adalora_scale.cli import main;"
        "Fidelity.allowed = -1.0; sys.exit(main(sys.argv[1:]))"  # every real difference is too large then
    )
    arguments = ["export", folder / "run", out, "--base", base, "--format", "peft-lora", "--overwrite", "--fidelity"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "was not written" in done.stdout and "largest logit difference" in done.stdout
    assert everything(tmp_path) == before


def test_a_fidelity_that_cannot_be_measured_leaves_the_old_export(made, tmp_path, monkeypatch):
    """Running out of memory while comparing must not cost the export that was there."""
    from adalora_scale.export import measuring

    base, folder = made
    copy(folder / "export", tmp_path / "out")
    before = everything(tmp_path)

    def fails(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(measuring, "compare", fails)
    with pytest.raises(MemoryError):
        export(folder / "run", tmp_path / "out", "--base", base, "--format", "merged", "--overwrite", "--fidelity")
    assert everything(tmp_path) == before
