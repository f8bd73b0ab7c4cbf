"""`adalora-scale sweep` as people start it: real trials of a few steps on the model that ships here."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from adalora_scale.cli import main
from adalora_scale.config import load_config
from adalora_scale.sweep.local import Local
from adalora_scale.sweep.search import Listed
from adalora_scale.sweep.trial import SLURM_NOTE, Trial, claimed, group_lives, note_group
from tests.conftest import ROOT

SMALL = [
    "training.max_steps=3", "training.warmup_steps=0", "training.logging_steps=1", "data.max_eval_samples=20",
    "model.load_in_4bit=false", "training.per_device_train_batch_size=4", "adalora.deltaT=1",
]  # fmt: skip
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(("ADALORA_", "SLURM_"))} | {
    "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1",
}  # fmt: skip


def command(folder, *arguments):
    recipe = "configs/recipes/quickstart.yaml"
    return [
        sys.executable, "-m", "adalora_scale", "sweep", "--config", recipe, "--output", str(folder), *SMALL,
        *arguments,
    ]  # fmt: skip


def sweep(folder, *arguments, code=0):
    result = subprocess.run(
        command(folder, *arguments), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result


def interrupted(folder, *arguments, number, patience=120, ending=60):
    """Start a sweep, send it a signal when its one trial has trained a step, and return that trial's folder."""
    environment = ENVIRONMENT | {"DS_ACCELERATOR": "cpu"}
    with subprocess.Popen(command(folder, *arguments), cwd=ROOT, env=environment, stdout=subprocess.PIPE) as running:
        deadline = time.monotonic() + patience
        while not any(path.stat().st_size for path in folder.glob("trials/*/metrics.jsonl")):
            assert running.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        running.send_signal(number)
        assert running.wait(ending) == 85
    (trial,) = folder.glob("trials/*")
    return trial


def trials(folder):
    """{folder's name: when its training last wrote}."""
    return {path.parent.name: path.stat().st_mtime_ns for path in folder.glob("trials/*/run.json")}


def test_a_grid_is_run_once_and_the_best_is_kept_as_a_config(tmp_path):
    """Else an interrupted or widened sweep pays for its trials again, or hands on a config that is not the winner's."""
    folder = tmp_path / "sweep"
    rates = "training.learning_rate=1e-4,3e-2"
    said = sweep(folder, "--grid", rates, "--seeds", "1").stdout
    first = trials(folder)
    assert len(first) == 2 + 1
    values = {
        name: json.loads((folder / "trials" / name / "run.json").read_text())["final"]["eval_loss"] for name in first
    }
    tuned = {name: value for name, value in values.items() if "seed-42" in name}
    winner = min(tuned, key=tuned.get)
    assert "rate-0.03-" in winner  # three steps at 1e-4 leave the base as it is
    assert all("rate-0.03-" in name for name in values.keys() - tuned.keys())  # the seeds are the winner's
    best = load_config(folder / "best.yaml")
    assert float(best.training["learning_rate"]) == 3e-2 and best.training["max_steps"] == 3
    assert f"{tuned[winner]:.4f}" in (folder / "best.yaml").read_text()
    table = (folder / "table.md").read_text()
    assert table in said and table.index("3e-2") < table.index("1e-4")
    config = json.loads((folder / "trials" / winner / "run.json").read_text())["config"]
    assert float(config["training"]["learning_rate"]) == 3e-2 and config["training"]["seed"] == 42

    said = sweep(folder, "--grid", rates + ",1e-2", "--json")
    found = json.loads(said.stdout)
    after = trials(folder)
    assert {name: after[name] for name in first} == first and len(after) == 4  # one more, the others untouched
    assert found["best"] == {"training.learning_rate": "3e-2"}
    assert [(t["earlier"], t["again"]) for t in found["trials"]] == [
        (True, False),
        (True, False),
        (False, False),
        (True, True),
    ]

    error = sweep(folder, "--grid", rates, "adalora.target_r=4", code=2).stderr
    assert "another config (its adalora differs)" in error and trials(folder) == after


def test_a_signal_leaves_a_checkpoint_and_the_same_command_goes_on(tmp_path):
    """A sweep that is stopped must not lose the hours of its trial, and its children must not go on alone."""
    folder = tmp_path / "sweep"
    words = ["--grid", "training.learning_rate=1e-3", "training.max_steps=60"]
    trial = interrupted(folder, *words, number=signal.SIGINT)
    (checkpoint,) = trial.glob("checkpoint-*")
    assert 0 < int(checkpoint.name.split("-")[1]) < 60 and not (trial / "run.json").exists()
    sweep(folder, *words)
    steps = [json.loads(line)["step"] for line in (trial / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 61)) and checkpoint.name in (trial / "train.log").read_text()


@pytest.mark.full
def test_optuna_goes_on_from_its_journal(tmp_path):
    """A second call that begins anew would propose what was tried and forget what came of it."""
    folder = tmp_path / "sweep"
    space = ["--range", "training.learning_rate=1e-3..1e-1", "--grid", "adalora.target_r=2,4"]
    sweep(folder, *space, "--trials", "2")
    first = trials(folder)
    assert len(first) == 2
    found = json.loads(sweep(folder, *space, "--trials", "3", "--json").stdout)
    after = trials(folder)
    assert len(after) == 3 and {name: after[name] for name in first} == first
    assert len(found["trials"]) == 3  # of the earlier call, too
    for trial in found["trials"]:
        assert 1e-3 <= float(trial["settings"]["training.learning_rate"]) <= 1e-1
        assert trial["settings"]["adalora.target_r"] in ("2", "4")
    assert found["best"] == min(found["trials"], key=lambda trial: trial["value"])["settings"]


@pytest.mark.full
def test_trials_side_by_side_and_one_that_fails(tmp_path):
    """A trial that cannot run must be named with its reason, and must not end the others."""
    folder = tmp_path / "sweep"
    result = sweep(
        folder, "--jobs", "2", "--grid", "model.attn_implementation=sdpa,flash_attention_2,eager", code=1
    )  # fmt: skip
    assert len(trials(folder)) == 2
    failed = next(line for line in (folder / "table.md").read_text().splitlines() if "flash_attention_2" in line)
    assert "failed (exit code 2: error: " in failed and "train.log" in failed
    assert result.stdout.count("the best so far") >= 1
    assert yaml.safe_load((folder / "best.yaml").read_text())["model"]["attn_implementation"] in ("sdpa", "eager")


def test_a_folder_in_which_somebody_trains_is_left_alone(tmp_path):
    """Two processes in one run's folder would mix their files; ranks may outlive the launcher that held the lock."""
    trial = Trial((("training.learning_rate", "1e-3"),), 42)
    folder = tmp_path / trial.name
    here = Local(tmp_path / "config.yaml", tmp_path, "eval_loss", None, 1)

    def states():
        told = []
        here.run(Listed([trial]), lambda _, outcome: told.append(outcome.state))
        return told

    with claimed(trial, folder) as lock:
        assert states() == ["running elsewhere"]
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as orphan:
        note_group(lock, orphan.pid)
        assert states() == ["running elsewhere"] and not (folder / "train.log").exists()
        orphan.kill()
    (folder / SLURM_NOTE).write_text("7\n")
    assert states() == ["running elsewhere"]


def test_a_dead_process_that_nobody_reaps_is_no_training():
    """In a container without an init it stays for ever, and so would a sweep that waits for it."""
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as process:
        assert group_lives(process.pid)
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and not yet waited for
        os.killpg(process.pid, 0)
        assert not group_lives(process.pid)


LAUNCHER = """
import json, math, sys, time
words = dict(word.split("=", 1) for word in sys.argv if "=" in word)
rate, folder = float(words["training.learning_rate"]), json.loads(words["training.output_dir"])
if rate == 0.5:
    sys.exit("RuntimeError: out of memory")
if rate > 0.5:
    print("error: this rate is refused")
    sys.exit(2)
if rate == 0.45:
    open(folder + "/wrong-end.json", "w").write('{"reason": "no finite gradient"}')
    sys.exit(3)
loss = math.nan if rate == 0.4 else abs(math.log10(rate) + 2)
run = {"final": {"eval_loss": loss}, "budget": {"spent": 10, "unit": "params"}, "wall_time_s": 1, "world_size": 1}
open(folder + "/run.json", "w").write(json.dumps(run))
"""


@pytest.fixture
def quick(tmp_path, monkeypatch, capsys):
    """Call a sweep whose runs take no time: what is tested is what it makes of them."""
    (tmp_path / "launcher.py").write_text(LAUNCHER)
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")

    def call(folder, *arguments, code=0):
        words = command(folder, "--launcher", f"{sys.executable} {tmp_path / 'launcher.py'}", *arguments)
        assert main(words[words.index("sweep") :]) == code
        return capsys.readouterr()

    return call


def test_every_trial_of_a_folder_counts_whatever_this_call_asked_for(tmp_path, quick):
    """Following the note "larger ones may be better" must not leave the larger ones' best as the winner of all."""
    folder = tmp_path / "a folder #1"  # YAML would cut it at the comment
    key = "training.learning_rate"
    said = quick(folder, "--grid", f"{key}=1e-3,1e-2,3e-2").out
    assert "largest" not in said
    said = quick(folder, "--jobs", "2", "--grid", f"{key}=0.03,0.1,0.2", "--json").out
    found = json.loads(said)
    assert found["best"] == {key: "1e-2"} and len(found["trials"]) == 5  # 3e-2 and 0.03 are one
    assert f"{key}=1e-2" in (folder / "best.yaml").read_text() and (folder / "table.md").read_text().count("\n") == 7
    assert load_config(folder / "best.yaml").training["output_dir"] == f"{folder}/best"
    quick(folder, "--grid", f"{key}=0.2", "--seeds", "3")
    shown = quick(folder, "--grid", f"{key}=0.2").out  # what is known of the winner stays in the table
    assert "| 45 | 0.0000 |" in shown and "0.0000 ± 0.0000" in shown


def test_what_diverges_fails_or_is_refused_is_told_apart(tmp_path, quick):
    """NaN is no JSON; a failure needs its reason; a mistake of all trials must not cost a try for each."""
    key = "training.learning_rate"
    said = quick(tmp_path / "a", "--grid", f"{key}=0.4,0.5,0.01", "--json", code=1).out
    states = {trial["settings"][key]: trial for trial in json.loads(said, parse_constant=pytest.fail)["trials"]}
    assert states["0.4"]["diverged"] and states["0.4"]["value"] is None and states["0.01"]["value"] == 0
    assert "exit code 1: RuntimeError: out of memory" in states["0.5"]["reason"]
    result = quick(tmp_path / "b", "--grid", f"{key}=0.4,0.45", code=1)
    assert "no finite gradient" in result.out and "failed" not in result.out
    assert "diverged" in result.err and not (tmp_path / "b" / "best.yaml").exists()
    said = quick(tmp_path / "c", "--grid", f"{key}=0.6,0.7,0.8,0.9,0.01", code=1).out
    assert said.count("this rate is refused") == 2 * 3 and said.count("not tried") == 2 * 2


@pytest.mark.full
@pytest.mark.parametrize("launcher", ["deepspeed --num_gpus 2", "torchrun --standalone --nproc-per-node 2"])
def test_a_signal_reaches_the_ranks_of_a_launcher(tmp_path, launcher, deepspeed_ops):
    """DeepSpeed's launcher dies of a signal and leaves its ranks training; they would go on beside the next call's."""
    folder = tmp_path / "sweep"
    words = ["--grid", "training.learning_rate=1e-3", "training.max_steps=60", "--launcher", launcher]
    if launcher.startswith("deepspeed"):
        words += ["--deepspeed", "configs/deepspeed/zero2.json"]
    trial = interrupted(folder, *words, number=signal.SIGTERM, patience=240, ending=90)
    assert len(list(trial.glob("checkpoint-*"))) == 1 and not (trial / "run.json").exists()
    before = (trial / "metrics.jsonl").read_bytes()
    time.sleep(2)
    assert (trial / "metrics.jsonl").read_bytes() == before
