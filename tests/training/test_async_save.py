"""`training.async_save`: checkpoints written while training goes on are those that stop it, or none."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from transformers import TrainerCallback

from adalora_scale.checkpoint import draft as drafts
from adalora_scale.checkpoint import format as files
from adalora_scale.checkpoint.format import CheckpointError, checkpoints
from adalora_scale.cli import train_main
from adalora_scale.errors import Interrupted, UserError, WrongEnd
from adalora_scale.training.checkpointing import RunCheckpoints
from adalora_scale.training.run import make_trainer, prepare, train
from tests.conftest import ROOT
from tests.disks import fill, small_disk
from tests.training.short_run import BASE, RECIPE, STEPS, assert_same, config

ASYNC = "training.async_save=true"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Steps(TrainerCallback):
    """Lets a writer wait until training has ended a step after the one that it writes."""

    def __init__(self):
        self.done, self.changed = 0, threading.Condition()

    def on_step_end(self, args, state, control, **kwargs):
        with self.changed:
            self.done = state.global_step
            self.changed.notify_all()

    def wait_for(self, step):
        with self.changed:
            assert self.changed.wait_for(lambda: self.done >= step, timeout=60), f"training did not reach step {step}"


def delayed(monkeypatch, steps, last=STEPS):
    """Let every checkpoint but the last be written after training has ended the next step."""
    write_tensors = files.write_tensors

    def later(path, tensors):
        assert threading.current_thread().name == "checkpoint"  # and not training's
        step = int(path.parent.stem.rpartition("-")[2])  # .checkpoint-2.partial
        if step < last:
            steps.wait_for(step + 1)
        return write_tensors(path, tensors)

    monkeypatch.setattr(files, "write_tensors", later)


def run(folder, *overrides, steps=None):
    asked = config(folder, ASYNC, *overrides)
    trainer = make_trainer(asked, prepare(asked))
    if steps is not None:
        trainer.add_callback(steps)
    trainer.train()
    trainer.save_model()
    return trainer


def content(folder):
    """File → bytes of every checkpoint; speeds, which no two runs share, are left out of the trainer's log."""
    found = {}
    for path in sorted(folder.glob("checkpoint-*/*")):
        name = str(path.relative_to(folder))
        if path.name == "trainer_state.json":
            tree = json.loads(path.read_text())
            tree["log_history"] = [
                {k: v for k, v in row.items() if "_per_second" not in k} for row in tree["log_history"]
            ]
            found[name] = json.dumps(tree)
        elif path.name == "manifest.json":
            tree = json.loads(path.read_text())
            del tree["checksum"], tree["files"]["trainer_state.json"]
            found[name] = json.dumps(tree)
        else:
            found[name] = path.read_bytes()
    return found


@pytest.mark.shows("features", feature="asynchronous checkpoints", engine="one process")
def test_what_is_written_while_training_goes_on_is_what_stops_it(tmp_path, monkeypatch, straight):
    """Weights of the step after in a checkpoint would be seen nowhere but in the final model."""
    steps = Steps()
    delayed(monkeypatch, steps)
    run(tmp_path / "out", steps=steps)
    ours, theirs = content(tmp_path / "out"), content(straight)
    assert ours.keys() == theirs.keys() and len(theirs) == 3 * STEPS // 2
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    adapter = "adapter_model.safetensors"
    assert (tmp_path / "out" / adapter).read_bytes() == (straight / adapter).read_bytes()
    assert not list((tmp_path / "out").glob(".checkpoint*"))


# Where a killed writer was, and what the folder then holds of checkpoint-4 under its hidden name.
BARRIERS = {
    "write_tensors": set(),
    "write_manifest": {"pieces-00000-of-00001.safetensors", "trainer_state.json"},
    "publish": {"pieces-00000-of-00001.safetensors", "trainer_state.json", "manifest.json"},
}
KILLED = """
import os, signal, sys
from adalora_scale.checkpoint import format as files
from adalora_scale.cli import train_main
name, real = sys.argv[1], getattr(files, sys.argv[1])
def killed(path, *rest):
    if "checkpoint-4" in str(path):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(path, *rest)
setattr(files, name, killed)
sys.exit(train_main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "barrier", ["publish", *(pytest.param(name, marks=pytest.mark.full) for name in BARRIERS if name != "publish")]
)
def test_a_writer_that_is_killed_leaves_the_checkpoint_before(barrier, tmp_path, straight):
    """A real SIGKILL between two steps of the writer's."""
    folder = tmp_path / "out"
    given = ["--config", RECIPE, "--skip-preflight", *BASE, ASYNC, f"training.output_dir={folder}"]
    done = subprocess.run([sys.executable, "-c", KILLED, barrier, *map(str, given)], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-2"]
    assert {path.name for path in (folder / ".checkpoint-4.partial").iterdir()} == BARRIERS[barrier]
    train(config(folder, ASYNC, "training.resume_from_checkpoint=auto"))
    assert_same(folder, straight)
    assert not list(folder.glob(".checkpoint*"))


def test_a_full_disk_ends_the_run_in_one_line_and_keeps_the_checkpoint_before(tmp_path, monkeypatch, capsys):
    """An error of a thread that nobody hears: the run would train on, and leave no checkpoint."""
    with small_disk(tmp_path / "disk", "16m") as disk:
        write_own = drafts.Draft.write_own

        def on_a_full_disk(self, tensors):
            if self.step == 4:
                fill(disk, but=65536)
            return write_own(self, tensors)

        monkeypatch.setattr(drafts.Draft, "write_own", on_a_full_disk)
        out = disk / "out"
        given = ["--config", RECIPE, "--skip-preflight", *BASE, ASYNC]
        assert train_main([*map(str, given), f"training.output_dir={out}"]) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
        assert len(said) == 1 and os.strerror(errno.ENOSPC) in said[0] and "pieces-00000" in said[0], said
        assert [path.name for path in checkpoints(out)] == ["checkpoint-2"]
        assert not list(out.glob(".checkpoint*")) and not (out / "adapter_model.safetensors").exists()


def test_a_failed_writer_ends_training_at_the_next_step_not_at_the_next_checkpoint(tmp_path, monkeypatch):
    """Hours of training that no checkpoint will hold."""
    failed = threading.Event()

    def refused(self, everyone):
        failed.set()
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(drafts.Draft, "finish", refused)
    steps = Steps()
    on_step_end = steps.on_step_end

    def after(args, state, control, **kwargs):
        if state.global_step == 3:
            assert failed.wait(60)
            for thread in [thread for thread in threading.enumerate() if thread.name == "checkpoint"]:
                thread.join()
        on_step_end(args, state, control, **kwargs)

    steps.on_step_end = after
    with pytest.raises(CheckpointError, match=f"checkpoint-2 cannot be written: {os.strerror(errno.EIO)}"):
        run(tmp_path / "out", "training.save_steps=2", steps=steps)
    assert steps.done == 3
    assert not list((tmp_path / "out").glob("*checkpoint*"))


class AtStep3(Steps):
    """Does something at the end of step 3, while checkpoint-2 is being written."""

    def __init__(self, action):
        super().__init__()
        self.action = action

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        if state.global_step == 3:
            self.action()


def test_a_signal_waits_for_the_checkpoint_that_is_being_written_and_leaves_its_own(tmp_path, monkeypatch):
    """The scheduler is told to start the run again: there must be something to go on from."""
    folder, steps = tmp_path / "out", AtStep3(lambda: os.kill(os.getpid(), signal.SIGTERM))
    delayed(monkeypatch, steps, last=3)
    with pytest.raises(Interrupted):
        run(folder, steps=steps)
    assert [path.name for path in checkpoints(folder)] == ["checkpoint-3", "checkpoint-2"]
    assert json.loads((folder / "requeue").read_text()) == {"step": 3, "signal": "SIGTERM"}


def test_training_that_fails_leaves_the_checkpoint_that_is_being_written_complete(tmp_path, monkeypatch):
    """An error a second after a checkpoint would cost an interval of training."""

    def fail():
        raise RuntimeError("out of memory, say")

    steps = AtStep3(fail)
    delayed(monkeypatch, steps)
    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path / "out", steps=steps)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert not list((tmp_path / "out").glob(".checkpoint*"))


def test_a_run_that_breaks_down_names_the_checkpoint_that_is_being_written(tmp_path, monkeypatch):
    """It said that there is no sound checkpoint, or the one before."""
    waited, publish, settle = threading.Event(), files.publish, RunCheckpoints.settle

    def waits(self):
        if self.trainer.state.global_step == 3:
            waited.set()
        settle(self)

    def later(partial, final):
        waited.wait(5)
        publish(partial, final)

    class Broken(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                next(p for p in model.parameters() if p.requires_grad).data.fill_(float("nan"))

    monkeypatch.setattr(files, "publish", later)
    monkeypatch.setattr(RunCheckpoints, "settle", waits)
    with pytest.raises(WrongEnd, match="last sound checkpoint is checkpoint-2"):
        run(tmp_path / "out", "training.max_skipped_steps=1", steps=Broken())


def test_rotation_deletes_only_when_the_next_checkpoint_is_complete(tmp_path, monkeypatch):
    """A run that is killed while it writes must find the one before, with save_total_limit=1 too."""
    folder, publish, seen = tmp_path / "out", files.publish, []

    def look(partial, final):
        seen.append([path.name for path in checkpoints(folder)])
        publish(partial, final)

    monkeypatch.setattr(files, "publish", look)
    run(folder, "training.save_total_limit=1", "training.save_steps=4")
    assert seen == [[], ["checkpoint-4"], ["checkpoint-8"], ["checkpoint-12"]]
    assert [path.name for path in checkpoints(folder)] == [f"checkpoint-{STEPS}"]


def test_the_key_is_used_or_refused_or_named(tmp_path, capsys):
    """Before anything is loaded, in one line."""
    with pytest.raises(UserError, match=r"training\.async_save=true.*training\.save_only_model=true.*remove one"):
        train(config(tmp_path / "out", ASYNC, "training.save_only_model=true"))
    prepare(config(tmp_path / "out", ASYNC, "training.save_strategy=no"))
    assert "training.async_save has no effect" in capsys.readouterr().out
