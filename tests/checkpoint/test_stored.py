"""Checkpoints on a store: complete or absent, rotated manifest first, and nobody else's files touched."""

import json
import shutil

import pytest

from adalora_scale.checkpoint import stored
from adalora_scale.checkpoint.errors import CheckpointError
from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.cli import main
from adalora_scale.store.client import Store, StoreError
from adalora_scale.training.run import train
from tests.training.short_run import config

LINES = ("metrics.jsonl", "ranks.jsonl", "scores.jsonl")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder with checkpoints of four steps."""
    folder = tmp_path_factory.mktemp("run") / "out"
    train(config(folder, "training.max_steps=4", "training.save_steps=1", "adalora.tinit=0", "adalora.tfinal=2"))
    return folder


@pytest.fixture
def store(tmp_path):
    return Store("training.output_store", f"file://{tmp_path}/store")


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_up_and_down_again_is_the_same(run, store, tmp_path):
    assert stored.upload(store, run / "checkpoint-2", [run / name for name in LINES])
    assert stored.complete(store) == [2]
    assert not stored.upload(store, run / "checkpoint-2", [])  # it is there
    back = stored.fetch(store, "checkpoint-2", tmp_path / "out", LINES)
    assert content(back) == content(run / "checkpoint-2")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"checkpoint-2", *LINES}
    assert (tmp_path / "out" / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_the_manifest_is_the_last_to_come_and_the_first_to_go(run, store, monkeypatch):
    order = []
    for name in ("put", "remove", "remove_folder"):
        real = getattr(Store, name)
        monkeypatch.setattr(
            Store,
            name,
            lambda self, *given, real=real, name=name: (order.append((name, given[-1])), real(self, *given)),
        )
    stored.upload(store, run / "checkpoint-1", [run / "metrics.jsonl"])
    assert order[-1] == ("put", "checkpoint-1/manifest.json") and order[0] == ("put", "metrics.jsonl")
    order.clear()
    stored.remove(store, "checkpoint-1")
    assert order == [("remove", "checkpoint-1/manifest.json"), ("remove_folder", "checkpoint-1")]
    assert store.names() == {"metrics.jsonl": (run / "metrics.jsonl").stat().st_size}
    # Another checkpoint under the name of one that is there: at no time half of each.
    store.write("checkpoint-1/manifest.json", b"{}")
    order.clear()
    stored.upload(store, run / "checkpoint-1", [])
    assert order[0] == ("remove", "checkpoint-1/manifest.json") and order[-1] == ("put", "checkpoint-1/manifest.json")
    # And a folder that was renamed has its step's name there.
    shutil.copytree(run / "checkpoint-3", run.parent / "other" / "checkpoint-9")
    stored.upload(store, run.parent / "other" / "checkpoint-9", [])
    assert stored.complete(store) == [3, 1]


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, [4, 3, 2, 1]),
        (2, None, [4, 3]),
        (1, None, [4]),
        (2, "checkpoint-1", [4, 1]),
        (1, "checkpoint-2", [4, 2]),
    ],
)
def test_rotation_keeps_the_newest_and_the_best(limit, best, left, run, store):
    for step in (1, 2, 3, 4):
        stored.upload(store, run / f"checkpoint-{step}", [])
    store.write("checkpoint-9/pieces-00000-of-00001.safetensors", b"half")  # counts for nothing
    stored.rotate(store, limit, best)
    assert stored.complete(store) == left


def test_what_a_run_does_not_continue_is_renamed_and_what_was_cut_off_is_cleared(run, store):
    for step in (1, 2, 3):
        stored.upload(store, run / f"checkpoint-{step}", [])
    store.write("checkpoint-4/pieces-00000-of-00001.safetensors", b"half")
    store.write("checkpoint-500/model.safetensors", b"of somebody else's trainer")
    store.write("checkpoint-500/trainer_state.json", b"{}")
    assert stored.set_aside(store, 2) == ["checkpoint-3"]
    assert stored.complete(store) == [2, 1] and not store.names("checkpoint-4")
    assert store.names("abandoned-checkpoint-3").keys() == {path.name for path in (run / "checkpoint-3").iterdir()}
    assert len(store.names("checkpoint-500")) == 2
    stored.upload(store, run / "checkpoint-3", [])
    assert stored.set_aside(store, None) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]
    assert {"abandoned-checkpoint-3", "abandoned-checkpoint-3-2"} <= store.names().keys()


def test_a_damaged_or_half_checkpoint_does_not_get_a_name_on_disk(run, store, tmp_path):
    stored.upload(store, run / "checkpoint-2", [])
    pieces = "checkpoint-2/pieces-00000-of-00001.safetensors"
    whole = store.read(pieces)
    store.write(pieces, whole[:-1] + bytes([whole[-1] ^ 1]))
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="checksum does not fit"):
        stored.fetch(store, "checkpoint-2", out, ())
    store.remove(pieces)
    with pytest.raises(StoreError, match="cannot be read"):
        stored.fetch(store, "checkpoint-2", out, ())
    with pytest.raises(CheckpointError, match="not complete"):
        stored.fetch(store, "checkpoint-7", out, ())
    assert not list(out.glob("*")) and not list(out.glob(".*"))
    store.write(pieces, whole)  # and what is damaged on disk is not deleted for it
    (out / "checkpoint-2").mkdir()
    (out / "checkpoint-2" / "mine").write_text("")
    Checkpoint(stored.fetch(store, "checkpoint-2", out, ())).verify()
    assert (out / "abandoned-checkpoint-2" / "mine").exists()


def test_longer_lines_on_disk_stay(run, store, tmp_path):
    """The machine that goes on is the one that was killed: it may have logged more than it had uploaded."""
    stored.upload(store, run / "checkpoint-2", [run / name for name in LINES])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "ranks.jsonl").write_text("{}\n" * 100)
    stored.fetch(store, "checkpoint-2", tmp_path / "out", LINES)
    assert (tmp_path / "out" / "ranks.jsonl").read_text() == "{}\n" * 100


def test_verbs_that_read_take_a_url(run, store, tmp_path, monkeypatch, capsys):
    """A run whose disk is gone is looked at where it is; what is written lies here, not in a copy that goes."""
    for path in [path for path in run.iterdir() if path.is_file() and not path.name.startswith(".")]:
        store.put(path, path.name)
    stored.upload(store, run / "checkpoint-2", [])
    monkeypatch.chdir(tmp_path)
    for folder, url in ((run, store.url), (run / "checkpoint-2", f"{store.url}/checkpoint-2")):
        said = []
        for name in (str(folder), url):
            assert main(["inspect", name, "--json"]) == 0
            said.append(json.loads(capsys.readouterr().out))
        assert said[0] | {"directory": ""} == said[1] | {"directory": ""}
    assert main(["report", store.url]) == 0 and (tmp_path / "report.html").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        main(["inspect", f"{store.url}/nothing"])
    assert "nothing holds no files" in capsys.readouterr().err.splitlines()[-1]
