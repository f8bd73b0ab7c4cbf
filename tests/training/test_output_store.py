"""`training.output_store`: what is on the store is what is on the disk, and a run goes on from either."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from transformers import TrainerCallback

from adalora_scale.checkpoint import stored
from adalora_scale.cli import train_main
from adalora_scale.errors import Interrupted, UserError, WrongEnd
from adalora_scale.store.client import Store
from adalora_scale.training import uploading
from adalora_scale.training.checkpointing import AfterReset
from adalora_scale.training.run import train
from adalora_scale.training.uploading import Uploader, leaving
from tests.conftest import ROOT
from tests.stores import BUCKET, s3  # noqa: F401
from tests.training.short_run import BASE, RECIPE, config, records

ADAPTER = "adapter_model.safetensors"
STORE = f"training.output_store=s3://{BUCKET}/run"
AUTO = "training.resume_from_checkpoint=auto"
SHORT = ["training.max_steps=6", "adalora.tinit=0", "adalora.tfinal=2", "data.eval=null", "adalora.deltaT=1"]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def disk(folder):
    """File → bytes of what a store is to hold of a run's folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    }


def there(s3):  # noqa: F811
    return {name: content for name, content in s3.objects("run").items() if name != ".run"}


class At(TrainerCallback):
    """Does things at the ends of steps: step → action."""

    def __init__(self, actions):
        self.actions = actions

    def on_step_end(self, args, state, control, **kwargs):
        self.actions.get(state.global_step, lambda: None)()


def wait_until(true):
    for _ in range(1200):
        if true():
            return
        threading.Event().wait(0.05)
    pytest.fail("nothing happened for a minute")


@pytest.fixture
def at(monkeypatch):
    """Let a run do things at the ends of steps; an action gets its uploader."""

    def at(actions):
        made = []
        make = uploading.make_uploader
        monkeypatch.setattr(
            "adalora_scale.training.run.make_uploader", lambda *given: made.append(make(*given)) or made[0]
        )
        bound = {step: lambda action=action: action(made[0]) for step, action in actions.items()}
        monkeypatch.setattr(AfterReset, "on_step_end", At(bound).on_step_end, raising=False)

    return at


def started(folder, *overrides):
    """Exit code of a start from the command line."""
    asked = [*BASE, *SHORT, f"training.output_dir={folder}", *overrides]
    return train_main(["--config", str(RECIPE), "--skip-preflight", *asked])


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run, which knows of no store."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    train(config(folder, *SHORT))
    return folder


def assert_same(folder, straight):
    assert (folder / ADAPTER).read_bytes() == (straight / ADAPTER).read_bytes()
    for name in ("metrics.jsonl", "ranks.jsonl", "scores.jsonl"):
        assert records(folder / name) == records(straight / name)


def test_a_store_that_does_not_answer_for_a_while_costs_nothing(s3, at, tmp_path, capfd, straight):  # noqa: F811
    """A run of days must not die for a blip; the next checkpoint brings along what is missing. With async_save."""
    at({
        1: lambda _: s3.down(),
        3: lambda uploader: wait_until(lambda: uploader._problem is not None),  # of checkpoint-2
        4: lambda _: s3.up(),
    })  # fmt: skip
    train(config(tmp_path / "out", STORE, *SHORT, "training.async_save=true"))
    ours, theirs = there(s3), disk(tmp_path / "out")
    assert ours.keys() == theirs.keys() and {"checkpoint-2/manifest.json", "run.json", "README.md"} <= theirs.keys()
    assert [name for name in theirs if ours[name] != theirs[name]] == []
    assert_same(tmp_path / "out", straight)
    secret = s3.environment["AWS_SECRET_ACCESS_KEY"].encode()
    assert not [name for name, content in ours.items() if secret in content]
    said = capfd.readouterr().out
    assert "Could not connect" in said and "Tried again at the next checkpoint" in said
    assert f"checkpoints and results are in s3://{BUCKET}/run" in said


KILLED = """
import os, signal, sys, threading
from adalora_scale.cli import train_main
from adalora_scale.store.client import Store
from adalora_scale.training.checkpointing import AfterReset
put, there = Store.put, threading.Event()
def killed(self, source, name):
    if name == "checkpoint-4/manifest.json":
        os.kill(os.getpid(), signal.SIGKILL)
    put(self, source, name)
    if name == "checkpoint-2/manifest.json":
        there.set()
def on_step_end(self, args, state, control, **kwargs):
    assert state.global_step != 3 or there.wait(60)
Store.put, AfterReset.on_step_end = killed, on_step_end
sys.exit(train_main(sys.argv[1:]))
"""


def test_a_kill_leaves_the_checkpoint_before_and_an_empty_disk_goes_on_from_it(s3, tmp_path, straight):  # noqa: F811
    """The machine is gone with its disk, right before the manifest of the newest checkpoint was there."""
    given = ["--config", RECIPE, "--skip-preflight", *BASE, *SHORT, STORE, f"training.output_dir={tmp_path / 'gone'}"]
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, given)], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert "checkpoint-4/pieces-00000-of-00001.safetensors" in there(s3)
    assert s3.checkpoints("run") == ["checkpoint-2"]
    url = f"s3://{BUCKET}/run/checkpoint-2"
    train(config(tmp_path / "branch", *SHORT, f"training.resume_from_checkpoint={url}"))  # without a store of its own
    assert_same(tmp_path / "branch", straight)
    assert not list((tmp_path / "branch").glob(".*")) and not (tmp_path / "branch" / "checkpoint-2").exists()
    assert s3.checkpoints("run") == ["checkpoint-2"]
    train(config(tmp_path / "out", *SHORT, STORE, AUTO))
    assert_same(tmp_path / "out", straight)
    assert there(s3) == disk(tmp_path / "out")
    assert s3.checkpoints("run") == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_slow_upload_loses_no_checkpoint_and_rotation_follows(s3, at, tmp_path, monkeypatch):  # noqa: F811
    """With save_total_limit=1 the next checkpoint deleted the folder that was being uploaded, every time."""
    upload, held, seen = stored.upload, threading.Event(), []

    def slowly(store, folder, beside):
        if folder.name == "checkpoint-2":
            assert held.wait(60)
            seen.append(folder.is_dir())
        return upload(store, folder, beside)

    monkeypatch.setattr(stored, "upload", slowly)
    at({5: lambda _: held.set()})
    train(config(tmp_path / "out", STORE, *SHORT, "training.save_total_limit=1"))
    assert seen == [True]
    assert s3.checkpoints("run") == ["checkpoint-6"] == sorted(p.name for p in (tmp_path / "out").glob("*checkpoint-*"))
    assert there(s3) == disk(tmp_path / "out")


def test_a_signal_waits_for_the_checkpoint_that_it_leaves(s3, at, tmp_path):  # noqa: F811
    """Where the disk goes with the machine, the store is all there is to start again from."""
    at({3: lambda _: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Interrupted):
        train(config(tmp_path / "out", STORE, *SHORT))
    assert s3.checkpoints("run") == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "out" / "requeue").exists() and "run.json" not in there(s3)


@pytest.mark.full
def test_the_best_checkpoint_so_far_comes_along(at, tmp_path):
    """An empty disk has only the newest: the best one is what the run is to end with."""
    keys = [*SHORT[:-2], "adalora.deltaT=1", "training.max_steps=8", "training.eval_strategy=steps",
            "training.eval_steps=2", "training.load_best_model_at_end=true", "training.metric_for_best_model=loss",
            "training.greater_is_better=true", "training.save_strategy=steps"]  # fmt: skip
    store = f"training.output_store=file://{tmp_path}/store"
    train(config(tmp_path / "straight", *keys))
    best = json.loads((tmp_path / "straight" / "checkpoint-8" / "trainer_state.json").read_text())
    assert best["best_model_checkpoint"].endswith("checkpoint-6")  # the first of those at the budget has the worst loss
    at({7: lambda _: os.kill(os.getpid(), signal.SIGTERM)})
    with pytest.raises(Interrupted):
        train(config(tmp_path / "gone", store, *keys))
    at({})
    train(config(tmp_path / "out", store, AUTO, *keys))
    assert {path.name for path in (tmp_path / "out").glob("checkpoint-*")} == {f"checkpoint-{n}" for n in (6, 7, 8)}
    assert (tmp_path / "out" / ADAPTER).read_bytes() == (tmp_path / "straight" / ADAPTER).read_bytes()


def test_what_is_not_on_the_store_at_the_end_is_an_error_and_the_same_command_mends_it(
    s3,  # noqa: F811
    at,
    tmp_path,
    capfd,
    monkeypatch,
):
    """Else a cluster's clean-up takes the only copy."""
    monkeypatch.setattr(uploading, "_PAUSES_S", ())
    at({5: lambda _: s3.down()})
    assert started(tmp_path / "out", STORE) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert len(said) == 1 and said[0].startswith(f"error: {STORE}") and "All of it is in" in said[0], said
    assert (tmp_path / "out" / "run.json").exists() and (tmp_path / "out" / ADAPTER).exists()
    s3.up()
    at({})
    assert started(tmp_path / "out", STORE, AUTO) == 0
    ours, theirs = there(s3), disk(tmp_path / "out")
    assert ours.keys() == theirs.keys() and [name for name in theirs if ours[name] != theirs[name]] == []


def test_another_run_on_the_store_is_not_replaced(s3, at, tmp_path, capfd, straight):  # noqa: F811
    """The rule of output_dir: a folder that holds a run is gone on with, or replaced by somebody who says so."""

    def error(*given):
        assert started(*given) == 2
        return next(line for line in capfd.readouterr().err.splitlines() if line.startswith("error"))

    client = s3.client()
    client.put_object(Bucket=BUCKET, Key="run/adapter_config.json", Body=b"{}")
    said = error(tmp_path / "new", STORE)
    assert f"{STORE} holds another run (adapter_config.json)" in said and "overwrite_output_dir=true" in said
    client.delete_object(Bucket=BUCKET, Key="run/adapter_config.json")

    def take_over(uploader):
        wait_until(lambda: s3.checkpoints("run"))
        uploader.store.write(".run", b"another start\n")

    at({3: take_over})
    said = error(tmp_path / "out", STORE, "training.learning_rate=1e-3")  # the checkpoint at step 2 was there before
    assert "was taken over by another run" in said and s3.checkpoints("run") == ["checkpoint-2"]
    at({})
    before = there(s3)
    shutil.copytree(straight, tmp_path / "other")
    said = error(tmp_path / "other", STORE, AUTO, "training.learning_rate=1e-3")
    assert "of another run" in said and "learning_rate" in said and there(s3) == before


def test_a_wrong_end_leaves_no_result_on_the_store(tmp_path, capfd):
    """An adapter of the run before would be taken for this one's."""
    store = Store("training.output_store", f"file://{tmp_path}/store")
    uploader = Uploader(store, tmp_path)
    uploader.begin("this", None)
    for name in ("run.json", ADAPTER, "metrics.jsonl"):
        store.write(name, b"{}")
    with pytest.raises(WrongEnd), leaving(uploader, ("run.json", ADAPTER)):
        raise WrongEnd("weights are no numbers")
    assert store.names().keys() == {".run", "metrics.jsonl", "wrong-end.json"}
    assert b"weights are no numbers" in store.read("wrong-end.json")
    uploader.begin("next", None)
    assert store.names().keys() == {".run", "metrics.jsonl"}


def test_a_store_takes_no_part_where_the_keys_leave_it_none(tmp_path):
    for wrong, says in (("training.output_dir=s3://bucket/run", "the store as training.output_store"),
                        ("training.resume_from_checkpoint=s3://bucket/run", "is no checkpoint; name one")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            train(config(tmp_path / "out", wrong))
