"""tests/mistakes.yaml: what newcomers get wrong is answered by a line that names key and fix, never by a traceback."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT

LIST = yaml.safe_load((Path(__file__).parent / "mistakes.yaml").read_text(encoding="utf-8"))
BASE = ROOT / "launch" / "quickstart" / "base_model"
HEAVY = ("torch", "transformers", "trl", "deepspeed", "accelerate", "datasets", "pyarrow", "pandas")
DRIVER = """
import contextlib, io, json, shlex, sys
from adalora_scale.cli import main, train_main
answers = []
for line in json.load(sys.stdin):
    program, *arguments = shlex.split(line)
    out, err, code = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = (train_main if program == "train.py" else main)(arguments)
        except SystemExit as end:
            code = end.code
        except BaseException as error:
            err.write(f"Traceback: {type(error).__name__}: {error}")
    heavy = [name for name in HEAVY if name in sys.modules]
    answers.append({"code": code, "out": out.getvalue(), "err": err.getvalue(), "heavy": heavy})
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files of mistakes.yaml."""
    where = tmp_path_factory.mktemp("mistakes")
    for name, text in LIST["files"].items():
        (where / name).parent.mkdir(parents=True, exist_ok=True)
        (where / name).write_text(text.replace("BASE", str(BASE)), encoding="utf-8", newline="")
    return where


@pytest.fixture(scope="module")
def light_answers(folder):
    """What all light commands said, in one process that imports what they import."""
    program = DRIVER.replace("in HEAVY", f"in {HEAVY!r}")
    lines = json.dumps([entry["run"] for entry in LIST["light"]])
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", program], input=lines, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return {entry["run"]: answer for entry, answer in zip(LIST["light"], json.loads(result.stdout), strict=True)}


def check(entry, code, out, err):
    assert "Traceback" not in out + err, err
    assert code == entry.get("code", 2), err
    last = err.strip().splitlines()[-1]
    assert entry["says"] in last, last
    assert entry.get("notes", "") in out + err, out + err


@pytest.mark.parametrize("entry", LIST["light"], ids=lambda entry: entry["run"])
def test_a_light_mistake_is_answered_without_the_libraries_that_take_seconds(entry, light_answers):
    answer = light_answers[entry["run"]]
    check(entry, answer["code"], answer["out"], answer["err"])
    assert answer["heavy"] == []


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("entry", LIST["here"], ids=lambda entry: entry["run"])
def test_a_mistake_is_answered_before_the_model_loads(entry, folder, monkeypatch, capfd):
    from adalora_scale.cli import main
    from adalora_scale.training import run

    monkeypatch.chdir(folder)
    monkeypatch.setattr(run, "place_model", lambda *_, **__: pytest.fail("the model was loaded"))
    monkeypatch.setenv("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    program, *arguments = shlex.split(entry["run"])
    assert program == "adalora-scale"
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    said = capfd.readouterr()
    check(entry, code, said.out, said.err)


@pytest.mark.full
@pytest.mark.parametrize("entry", LIST["started"], ids=lambda entry: entry["run"])
def test_a_mistake_on_a_launcher_ends_without_a_traceback(entry, folder):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "ADALORA_VENV": str(Path(sys.executable).parents[1])}
    environment |= {"ADALORA_LOG_DIR": str(folder / "logs")}
    command = [word if word not in LIST["files"] else str(folder / word) for word in shlex.split(entry["run"])]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    check(entry, result.returncode, result.stdout, result.stderr)


def test_there_are_at_least_forty():
    commands = [entry["run"] for kind in ("light", "here", "started") for entry in LIST[kind]]
    assert len(commands) == len(set(commands)) >= 40
