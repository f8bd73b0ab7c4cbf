"""Two runs on one output_dir mix their records and delete each other's checkpoints: the second is refused."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from adalora_scale import AdaLoraCallback, AdaLoraConfig, AdaLoraTrainer, inject_adalora
from adalora_scale.checkpoint.format import checkpoints
from adalora_scale.errors import UserError
from adalora_scale.training import lease as leases
from adalora_scale.training.lease import LEASE_NAME, held, take
from adalora_scale.training.run import make_trainer, prepare, train
from tests.conftest import ROOT
from tests.training.short_run import assert_same, config

HOLD = "import sys, time; from pathlib import Path; from adalora_scale.training.lease import take; " \
       "lease = take(Path(sys.argv[1])); print('held', flush=True); time.sleep(600)"  # fmt: skip


@pytest.fixture
def holder(tmp_path):
    """Another process that holds tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def of_another_machine(folder, **changes):
    """Rewrite a lease as a machine elsewhere would have left it."""
    with held(folder):
        content = json.loads((folder / LEASE_NAME).read_text())
    content |= {"machine": "elsewhere", "host": "far", "id": "theirs"} | changes
    (folder / LEASE_NAME).write_text(json.dumps(content))
    return folder / LEASE_NAME


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(leases, "STALE_AFTER_S", 1.5)
    monkeypatch.setattr(leases, "RENEWED_EVERY_S", 0.1)
    monkeypatch.setattr(leases, "_LOOK_EVERY_S", 0.02)


def test_a_second_start_says_who_holds_the_folder(holder, tmp_path):
    """The first keeps its lease, and nothing of the second is left."""
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(UserError, match=rf"output_dir={tmp_path} is in use by another run: process {holder.pid} on "):
        take(tmp_path)
    assert sorted(os.listdir(tmp_path)) == before == [LEASE_NAME]


def test_what_a_killed_run_held_is_taken_at_once(holder, tmp_path):
    """A launcher starts ranks again within a second."""
    holder.send_signal(signal.SIGKILL)
    stat = Path(f"/proc/{holder.pid}/stat")  # its parent has not asked for it yet, as a launcher may not have
    while stat.read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.01)
    begun = time.monotonic()
    with held(tmp_path):
        assert time.monotonic() - begun < 1
        assert json.loads((tmp_path / LEASE_NAME).read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


def test_the_number_of_a_dead_process_may_be_another_ones_now(holder, tmp_path):
    content = json.loads((tmp_path / LEASE_NAME).read_text())
    (tmp_path / LEASE_NAME).write_text(json.dumps(content | {"birth": "1"}))
    take(tmp_path).release()


def test_a_process_of_somebody_else_that_proc_hides_is_not_taken_for_dead(hasty, tmp_path, monkeypatch):
    """Shared machines mount /proc so that one sees one's own processes alone."""
    lease = of_another_machine(tmp_path)
    with held(tmp_path / "own"):
        content = json.loads((tmp_path / "own" / LEASE_NAME).read_text())
    lease.write_text(json.dumps(content | {"pid": content["pid"] + 1, "id": "theirs"}))

    def refuse(pid, number):
        raise PermissionError

    monkeypatch.setattr(leases, "_birth", lambda pid: "1" if pid == os.getpid() else None)
    monkeypatch.setattr(leases.os, "kill", refuse)
    begun = time.monotonic()
    take(tmp_path).release()
    assert time.monotonic() - begun > 1


def test_a_lease_of_another_machine_is_waited_for_and_then_taken(hasty, tmp_path, capsys):
    of_another_machine(tmp_path)
    begun = time.monotonic()
    take(tmp_path).release()
    assert 1 < time.monotonic() - begun < 5
    assert "left by process" in capsys.readouterr().out


def test_a_lease_that_another_machine_renews_is_refused(hasty, tmp_path):
    lease = of_another_machine(tmp_path)
    done = threading.Event()
    thread = threading.Thread(target=lambda: [os.utime(lease) for _ in range(200) if not done.wait(0.05)])
    thread.start()
    try:
        with pytest.raises(UserError, match=rf"process \d+ on far.*if that is gone for certain, delete {lease}"):
            take(tmp_path)
    finally:
        done.set()
        thread.join()


@pytest.mark.parametrize("age", [-86400, 86400], ids=["clock went back", "old"])
def test_clocks_that_differ_end_in_a_lease_all_the_same(age, hasty, tmp_path):
    lease = of_another_machine(tmp_path)
    os.utime(lease, (time.time() - age, time.time() - age))
    begun = time.monotonic()
    take(tmp_path).release()
    assert (time.monotonic() - begun < 1) == (age > 0)


@pytest.mark.parametrize("content", ["", "{}", "[1]", "not JSON", '{"id": 1}'])
def test_a_file_that_is_no_lease_is_taken_over_when_it_is_old(content, hasty, tmp_path):
    (tmp_path / LEASE_NAME).write_text(content)
    take(tmp_path).release()
    assert os.listdir(tmp_path) == []


def test_a_requeued_job_takes_its_own_lease_at_once(tmp_path, monkeypatch):
    """SLURM starts a job again, on other machines, only when it has ended on the ones before."""
    of_another_machine(tmp_path, job="77", restart=0)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begun = time.monotonic()
    take(tmp_path).release()
    assert time.monotonic() - begun < 1


def test_of_many_at_once_one_gets_a_dead_lease(tmp_path):
    """Each sees the same dead lease; one of them must not remove what another has just made."""
    of_another_machine(tmp_path)
    content = json.loads((tmp_path / LEASE_NAME).read_text())
    alive = json.loads(json.dumps(content))
    with held(tmp_path / "own"):
        alive["machine"] = json.loads((tmp_path / "own" / LEASE_NAME).read_text())["machine"]
    (tmp_path / LEASE_NAME).write_text(json.dumps(alive | {"pid": 2**22 + 1}))
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(6)]
    try:
        deadline = time.monotonic() + 60
        while sum(process.poll() is None for process in started) > 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        ended = [process for process in started if process.poll() is not None]
        assert len(ended) == 5
        assert all("in use by another run" in process.stderr.read() for process in ended)
    finally:
        for process in started:
            process.kill()


def test_it_is_renewed_and_given_back(hasty, tmp_path):
    with held(tmp_path) as lease:
        os.utime(tmp_path / LEASE_NAME, (1, 1))
        deadline = time.monotonic() + 10
        while (tmp_path / LEASE_NAME).stat().st_mtime < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert time.time() - (tmp_path / LEASE_NAME).stat().st_mtime < 60
        lease.require()
    assert os.listdir(tmp_path) == []


def test_a_lease_that_somebody_removed_is_not_taken_back(tmp_path):
    """Another run may have come and gone meanwhile."""
    with held(tmp_path) as lease:
        (tmp_path / LEASE_NAME).unlink()
        with pytest.raises(UserError, match=r"lease\.json is no longer this run's: somebody removed or changed it"):
            lease.require()
        (tmp_path / LEASE_NAME).mkdir()
        with pytest.raises(UserError, match=r"lease\.json cannot be read"):
            lease.require()


def test_a_process_forked_from_the_holder_gives_nothing_back(tmp_path):
    with held(tmp_path) as lease:
        pid = os.fork()
        if pid == 0:
            lease.release()
            os._exit(0)
        os.waitpid(pid, 0)
        lease.require()


def test_a_run_is_refused_before_its_rows_are_read(holder, tmp_path):
    """Else tokenising lasts for an hour, and then the refusal comes."""
    settings = config(tmp_path, "data.train=nothing.jsonl", "training.overwrite_output_dir=true")
    with pytest.raises(UserError, match="in use by another run"):
        train(settings)


@pytest.mark.parametrize("ours", [True, False], ids=["AdaLoraTrainer", "Trainer"])
def test_a_trainer_made_by_hand_is_refused_too(ours, holder, tmp_path, stories260k):
    """Nothing of the trainer's own is in its way."""
    model = inject_adalora(AutoModelForCausalLM.from_pretrained(stories260k), AdaLoraConfig())
    arguments = TrainingArguments(str(tmp_path), max_steps=20, use_cpu=True, report_to="none", bf16=False)
    rows = [{"input_ids": [1, 5, 6], "labels": [1, 5, 6]}] * 40
    kind, callbacks = (AdaLoraTrainer, []) if ours else (Trainer, [AdaLoraCallback()])
    trainer = kind(model, arguments, train_dataset=rows, callbacks=callbacks)
    with pytest.raises(UserError, match="in use by another run"):
        trainer.train()
    holder.kill()
    holder.wait()
    trainer.train()
    assert not (tmp_path / LEASE_NAME).exists()


def test_a_run_that_lost_its_lease_stops_before_it_writes(tmp_path, straight):
    """A suspended machine wakes up, and another run has gone on meanwhile."""
    settings = config(tmp_path / "out")
    trainer = make_trainer(settings, prepare(settings))
    inner, seen = trainer.training_step, {}

    def training_step(*args, **kwargs):
        if trainer.state.global_step == 5 and not seen:
            of_another_machine_took = json.loads((tmp_path / "out" / LEASE_NAME).read_text()) | {
                "id": "x",
                "host": "far",
            }
            (tmp_path / "out" / LEASE_NAME).write_text(json.dumps(of_another_machine_took))
            seen.update({path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()})
        return inner(*args, **kwargs)

    trainer.training_step = training_step
    with pytest.raises(UserError, match=r"was taken over by process \d+ on far.*ends before it writes"):
        trainer.train()
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()} == seen
    (tmp_path / "out" / LEASE_NAME).unlink()
    train(config(tmp_path / "out", "training.resume_from_checkpoint=auto"))
    assert_same(tmp_path / "out", straight)
    assert checkpoints(tmp_path / "out")
    assert not (tmp_path / "out" / LEASE_NAME).exists()
