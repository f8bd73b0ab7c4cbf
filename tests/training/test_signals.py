"""A signal means the same from a run's first line to its last: an orderly end, and what there is to go on from."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest

from adalora_scale.checkpoint.format import checkpoints
from adalora_scale.errors import Interrupted
from adalora_scale.training import output_dir
from adalora_scale.training import run as running
from adalora_scale.training import stopping as stops
from adalora_scale.training.run import train
from adalora_scale.training.stopping import SCHEDULERS, stopping
from tests.conftest import ROOT
from tests.training.short_run import BASE, RECIPE, STEPS, assert_same, config

CODES = {signal.SIGTERM: 85, signal.SIGUSR1: 85, signal.SIGINT: 130}
NAMES = {number: number.name for number in CODES}


def signalled(monkeypatch, name, number, where=running):
    """Let a function of the run get a signal when it is called."""
    inner = getattr(where, name)

    def wrapped(*args, **kwargs):
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # Python runs its handlers between two instructions
        return inner(*args, **kwargs)

    monkeypatch.setattr(where, name, wrapped)


@pytest.mark.parametrize("number", CODES, ids=NAMES.get)
@pytest.mark.parametrize("phase", ["load_raw", "load_tokenizer", "place_model"])
def test_before_the_first_step_a_signal_ends_the_run_at_once(phase, number, tmp_path, monkeypatch, capsys):
    """A killed process would leave no note, and the job would not go back into the queue."""
    with monkeypatch.context() as patch:
        signalled(patch, phase, number)
        with pytest.raises(Interrupted) as caught:
            train(config(tmp_path / "out"))
    assert caught.value.code == CODES[number]
    note = tmp_path / "out" / "requeue"
    assert note.exists() == (number != signal.SIGINT)
    if note.exists():
        assert json.loads(note.read_text()) == {"step": None, "signal": number.name}
    assert f"{number.name} before the first step: there is no checkpoint yet" in capsys.readouterr().out
    assert all(signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler) for number in CODES)
    assert set(os.listdir(tmp_path / "out") if note.exists() else []) <= {"requeue"}


def test_a_run_that_goes_on_says_from_where(tmp_path, monkeypatch, capsys, crashed, straight):
    folder = crashed(6)
    with monkeypatch.context() as patch:
        signalled(patch, "place_model", signal.SIGTERM)
        with pytest.raises(Interrupted):
            train(config(folder, "training.resume_from_checkpoint=auto"))
    assert "resume_from_checkpoint=auto goes on from checkpoint-6" in capsys.readouterr().out
    train(config(folder, "training.resume_from_checkpoint=auto"))
    assert not (folder / "requeue").exists()
    assert_same(folder, straight)


EVALUATED = ("data.max_eval_samples=32", "training.per_device_eval_batch_size=4")


@pytest.mark.parametrize("number", CODES, ids=NAMES.get)
def test_the_final_evaluation_is_left_and_done_again(number, tmp_path, monkeypatch):
    """It may take an hour, and the scheduler waits for minutes."""
    straight = tmp_path / "straight"
    train(config(straight, *EVALUATED))
    with monkeypatch.context() as patch:
        from adalora_scale.training.trainers import AdaLoraSFTTrainer

        signalled(patch, "prediction_step", number, AdaLoraSFTTrainer)
        with pytest.raises(Interrupted) as caught:
            train(config(tmp_path / "out", *EVALUATED))
    assert caught.value.code == CODES[number]
    assert checkpoints(tmp_path / "out")[0].name == f"checkpoint-{STEPS}"
    assert not (tmp_path / "out" / "run.json").exists()
    train(config(tmp_path / "out", *EVALUATED, "training.resume_from_checkpoint=auto"))
    assert_same(tmp_path / "out", straight)
    final = [json.loads((folder / "run.json").read_text())["final"] for folder in (straight, tmp_path / "out")]
    assert final[0]["eval_loss"] == final[1]["eval_loss"]


@pytest.mark.parametrize("number", CODES, ids=NAMES.get)
def test_what_is_written_at_the_end_is_written_to_its_end(number, tmp_path, monkeypatch, straight, capsys):
    """Nothing is left to start again for; a half-written adapter would be all there is."""
    from adalora_scale.training import trainers

    signalled(monkeypatch, "replacing", number, trainers)  # between the adapter and its tokenizer
    signalled(monkeypatch, "write_json", number)
    monkeypatch.setattr(stops, "_SAME_PRESS_S", 60.0)
    train(config(tmp_path / "out"))
    assert_same(tmp_path / "out", straight)
    assert json.loads((tmp_path / "out" / "run.json").read_text())["total_step"] == STEPS
    assert not (tmp_path / "out" / "requeue").exists()
    assert f"{number.name} came when results were being written" in capsys.readouterr().out


def test_the_folder_of_another_run_gets_no_note(tmp_path, monkeypatch, straight):
    """A start that is refused anyway must not ask for the other run's restart."""
    before = sorted(os.listdir(straight))
    signalled(monkeypatch, "_check", signal.SIGTERM, output_dir)
    with pytest.raises(Interrupted):
        train(config(straight))
    assert sorted(os.listdir(straight)) == before


def test_a_run_that_overwrites_another_is_not_told_to_go_on_from_it(tmp_path, monkeypatch, straight, capsys):
    """`auto` would find the old run's last checkpoint, and the old adapter would be called done."""
    folder = tmp_path / "out"
    shutil.copytree(straight, folder)
    signalled(monkeypatch, "load_tokenizer", signal.SIGTERM)
    with pytest.raises(Interrupted):
        train(config(folder, "training.overwrite_output_dir=true"))
    assert "SIGTERM before the first step: start it again as it was started" in capsys.readouterr().out
    assert not (folder / "requeue").exists()


def test_one_press_that_comes_twice_is_one_and_a_second_one_ends_at_once():
    """A terminal and torchrun both send SIGINT; who presses again after a moment does not want to wait."""
    program = (
        "import os, signal, time\n"
        "from adalora_scale.training.stopping import SIGNALS, stopping\n"
        "with stopping.listening(SIGNALS):\n"
        "    stopping.defer()\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(1.5)\n"
        "    print('alive', flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(1)\n"
        "    print('still alive', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (130, "alive\n")
    assert "SIGINT again" in result.stderr


def test_a_main_thread_that_does_not_come_back_is_ended():
    """In a collective that waits for a rank that is gone, Python runs no handler and no exception gets out."""
    program = (
        "import ctypes, os, signal, threading, time\n"
        "from adalora_scale.training import stopping as stops\n"
        "stops._GRACE_S = 0.5\n"
        "def stuck():\n"
        "    try: time.sleep(30)\n"
        "    finally: ctypes.CDLL(None).sleep(30)\n"
        "with stops.stopping.listening(stops.SIGNALS):\n"
        "    threading.Timer(0.5, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()\n"
        "    stuck()\n"
    )
    begun = time.monotonic()
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 85
    assert time.monotonic() - begun < 15


def test_a_trainer_in_a_notebook_leaves_sigint_to_python_and_loses_no_signal():
    """Whoever made the trainer is told by KeyboardInterrupt; a SIGTERM that nobody acted upon ends the process."""
    with stopping.listening(SCHEDULERS):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    program = (
        "import os, signal\n"
        "from adalora_scale.training.stopping import SCHEDULERS, stopping\n"
        "with stopping.listening(SCHEDULERS):\n"
        "    stopping.defer()\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('ended its work', flush=True)\n"
        "print('lost', flush=True)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (-signal.SIGTERM, "ended its work\n")


def test_a_signal_while_the_interpreter_ends_changes_nothing():
    """The run is done and said so; its exit code would say that it was killed."""
    program = (
        "import atexit, os, signal\n"
        "from adalora_scale.training.stopping import SIGNALS, stopping\n"
        "atexit.register(lambda: [os.kill(os.getpid(), number) for number in SIGNALS])\n"
        "with stopping.listening(SIGNALS, until_exit=True):\n"
        "    raise SystemExit(0)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_other_threads_may_train():
    errors = []

    def inside():
        try:
            with stopping.a_run():
                pass
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert errors == []


@pytest.mark.parametrize("draw", [0, *(pytest.param(n, marks=pytest.mark.full) for n in range(1, 12))])
def test_at_any_moment_of_the_real_command(draw, tmp_path, straight):
    """Imports, tokenising, loading, training, saving: whatever it is, the same run comes out after as many starts."""
    moments = random.Random(draw)
    command = [sys.executable, "launch/train.py", "--config", str(RECIPE), *BASE]
    command += [f"training.output_dir={tmp_path}/out", "training.resume_from_checkpoint=auto"]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    said, code = "", None
    for _ in range(3):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "out" / "lease.json").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 15))
            number = moments.choice(list(CODES))
            process.send_signal(number)
            said += process.communicate(timeout=120)[0]
        finally:
            process.kill()
        code = process.returncode
        assert code in (0, CODES[number]), said
        assert "Traceback" not in said
        if code == 0:
            break
        assert (tmp_path / "out" / "requeue").exists() == (code == 85), said
        (tmp_path / "out" / "requeue").unlink(missing_ok=True)
    if code != 0:
        subprocess.run(command, cwd=ROOT, env=environment, check=True)
    assert_same(tmp_path / "out", straight)
