"""kill -9 at every step of publishing: the old folder or the new one is whole, and the next call clears up."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from adalora_scale.errors import UserError
from adalora_scale.export import publishing
from tests.conftest import ROOT
from tests.export.killed import seen, write

KILLER = Path(__file__).with_name("killed.py")


def kill_everywhere(folder, how, before):
    command = [sys.executable, str(KILLER), str(folder / "root"), how, before]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert len(rows) > 20 and rows[-1]["ended"] == 0 and rows[-1]["killed"] == "new"
    return rows


def dead_pid():
    """A process that has ended."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_killed_while_replacing_old_or_new_is_there(tmp_path):
    """A model that is being served must be at its place whenever the machine goes down."""
    rows = kill_everywhere(tmp_path, "swap", "old")
    assert {row["killed"] for row in rows} == {"old", "new"}
    for row in rows:
        assert row["refused"][0] == 2 and row["after refusal"] == row["killed"], row
        assert row["next"][0] == 0 and row["after"] == "next" and row["left"] == ["out"], row


def test_killed_between_two_renames_the_old_is_put_back(tmp_path):
    """Where names cannot be exchanged nothing is at the target for a moment: it must come back, and be said."""
    rows = kill_everywhere(tmp_path, "renames", "old")
    assert {row["killed"] for row in rows} == {"old", None, "new"}
    for row in rows:
        if row["killed"] is None:
            assert ".out.replaced" in row["hidden"]
            assert row["after refusal"] == "old" and "what was there before is back" in row["refused"][1], row
        assert row["refused"][0] == 2 and row["after refusal"] in ("old", "new"), row
        assert row["next"][0] == 0 and row["after"] == "next" and row["left"] == ["out"], row


def test_killed_at_the_first_export_leaves_all_or_nothing(tmp_path):
    """Half a folder would be served; half a folder under a hidden name takes the disk's room for ever."""
    rows = kill_everywhere(tmp_path, "swap", "new")
    assert {row["killed"] for row in rows} == {None, "new"}
    for row in rows:
        assert row["after refusal"] == ("third" if row["killed"] is None else "new"), row
        assert row["next"][0] == 0 and row["left"] == ["out"], row


def test_names_are_exchanged_here(tmp_path):
    """Else the tests above would try two renames only, on the file systems that everybody has."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not publishing.swap(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange two names")
    assert (tmp_path / "a" / "b").exists() and (tmp_path / "b" / "a").exists()


def test_a_rename_that_fails_leaves_the_old_folder(tmp_path, monkeypatch):
    """The second of two renames may fail; the old folder is hidden then."""
    write(tmp_path / "out", "old")
    monkeypatch.setattr(publishing, "swap", lambda one, other: False)
    real = os.rename

    def fails(source, target):
        if ".partial-" in str(source):
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(publishing.os, "rename", fails)
    with pytest.raises(UserError, match="Input/output error"):
        write(tmp_path / "out", "new")
    assert seen(tmp_path / "out") == "old" and [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_live_process_writes_is_left_alone(tmp_path, capsys):
    """Two exports at once, or one on another machine: deleting the other's half would break it."""
    names = [f".out.partial-{os.getppid()}", f".out.partial-{dead_pid()}-another-host"]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "half").touch()
    write(tmp_path / "out", "new")
    said = capsys.readouterr().err
    assert all((tmp_path / name / "half").exists() and name in said for name in names)


def test_what_a_dead_process_left_is_removed(tmp_path):
    """Otherwise 140 GB stay under a name that nobody lists."""
    for host in ("", f"-{socket.gethostname()}"):
        half = tmp_path / f".out.partial-{dead_pid()}{host}"
        half.mkdir()
        (half / "model.safetensors").touch()
    write(tmp_path / "out", "new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_leftovers_that_are_not_ours_are_named(tmp_path, capsys):
    """A hidden name is no proof: what has no record of this tool, or is a link, may be somebody's."""
    write(tmp_path / "out", "old")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").touch()
    (tmp_path / f".out.partial-{dead_pid()}").symlink_to(precious)
    old = tmp_path / f".out.replaced-{dead_pid()}"  # of a version that replaced any folder with a config.json
    old.mkdir()
    (old / "config.json").touch()
    write(tmp_path / "out", "new")
    said = capsys.readouterr().err
    assert (precious / "thesis.tex").exists() and (old / "config.json").exists()
    assert old.name in said and ".out.partial-" in said and seen(tmp_path / "out") == "new"


def test_a_file_that_comes_in_while_the_new_one_is_written_is_kept(tmp_path, capsys):
    """A merge takes an hour; what was looked at before it is not what is there after it."""
    write(tmp_path / "out", "old")

    class Word(str):
        def __format__(self, spec):
            (tmp_path / "out" / "thesis.tex").touch()
            return "new"

    with pytest.raises(UserError, match=r"thesis\.tex"):
        write(tmp_path / "out", Word("new"))
    assert (tmp_path / "out" / "thesis.tex").exists() and [path.name for path in tmp_path.iterdir()] == ["out"]
