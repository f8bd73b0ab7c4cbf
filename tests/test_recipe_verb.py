"""`adalora-scale recipes`, in the repository and from an installed wheel."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile

import pytest
import yaml

from adalora_scale.cli import main
from adalora_scale.config import load_config
from adalora_scale.recipes.reading import recipe, recipes
from tests.conftest import ROOT

FOLDER = ROOT / "configs" / "recipes"


def test_every_recipe_is_listed_with_a_line_and_its_hardware(capsys):
    """Else one is there that nobody finds, or nobody knows what it needs."""
    assert main(["recipes", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert sorted(listed) == sorted(path.stem for path in FOLDER.glob("*.yaml"))
    assert all(len(one["what"]) > 10 and len(one["hardware"]) > 5 for one in listed.values())
    assert main(["recipes"]) == 0
    said = capsys.readouterr().out
    assert all(one.what in said and one.hardware in said for one in recipes())


@pytest.mark.parametrize("name", [path.stem for path in sorted(FOLDER.glob("*.yaml"))])
def test_what_is_written_is_the_recipe(name, tmp_path, capsys):
    """Else the one that people copy is not the one that was tested."""
    assert main(["recipes", name, "--output", str(tmp_path / "run.yaml")]) == 0
    capsys.readouterr()
    assert main(["recipes", name]) == 0
    assert capsys.readouterr().out == (tmp_path / "run.yaml").read_text()
    written, shipped = load_config(tmp_path / "run.yaml").to_dict(), load_config(FOLDER / f"{name}.yaml").to_dict()
    if name == "quickstart":  # its files are found from any folder
        for section, key in (("model", "model_name_or_path"), ("data", "train"), ("data", "eval")):
            assert os.path.samefile(written[section][key], ROOT / shipped[section].pop(key))
            del written[section][key]
    assert written == shipped


def test_a_path_that_yaml_would_misread_is_quoted(monkeypatch, tmp_path):
    """Else an installation under `my #1 folder: new` trains nothing."""
    folder = tmp_path / "my #1 folder: new"
    monkeypatch.setattr("adalora_scale.recipes.reading._INSTALLED", folder)
    found = yaml.safe_load(recipe("quickstart").text)
    assert found["model"]["model_name_or_path"] == str(folder / "base_model")


def test_mistakes_are_one_line(tmp_path, capsys):
    """A file that somebody edited would be gone, or a misspelt name would end in a trace."""
    kept = tmp_path / "run.yaml"
    kept.write_text("mine")
    for words, expected in (
        (["quikstart"], "Did you mean 'quickstart'"),
        (["quickstart", "--output", str(kept)], "is there already"),
        (["--output", str(tmp_path / "other.yaml")], "needs the NAME"),
        (["quickstart", "--json"], "--json is for the list"),
    ):
        assert main(["recipes", *words]) == 2
        said = capsys.readouterr()
        assert expected in said.err and said.err.count("\n") == 1 and not said.out
    assert kept.read_text() == "mine"


@pytest.mark.timeout(300)
def test_the_quickstart_trains_from_a_wheel_alone(tmp_path):
    """`adalora-scale recipes quickstart > q.yaml`, train: without the repository nothing may be missing."""
    build = "from setuptools import build_meta; print(build_meta.build_wheel(__import__('sys').argv[1]))"
    source = tmp_path / "source"
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if name.startswith("adalora_scale/") or name in ("pyproject.toml", "README.md", "LICENSE"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    built = subprocess.run([sys.executable, "-c", build, tmp_path], cwd=source, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    wheel = tmp_path / built.stdout.split()[-1]
    # The environment has nothing but what the project depends on: neither the repository nor its path file.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    for found in os.scandir(sysconfig.get_path("purelib")):
        if "adalora" not in found.name and not (site / found.name).exists():
            (site / found.name).symlink_to(found.path)
    python = tmp_path / "venv" / "bin" / "python"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    run = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 250}
    where = subprocess.run([python, "-c", "import adalora_scale; print(adalora_scale.__file__)"], check=True, **run)
    assert where.stdout.startswith(str(site))
    written = subprocess.run([python, "-m", "adalora_scale", "recipes", "quickstart"], check=True, **run)
    (tmp_path / "q.yaml").write_text(written.stdout)
    short = ["training.max_steps=10", "adalora.deltaT=1", "data.max_train_samples=64", "data.max_eval_samples=8"]
    trained = subprocess.run([python, "-m", "adalora_scale", "train", "--config", "q.yaml", *short], **run)
    assert trained.returncode == 0, trained.stderr[-3000:]
    assert "done: " in trained.stdout
    assert (tmp_path / "runs" / "quickstart" / "adapter_model.safetensors").is_file()
