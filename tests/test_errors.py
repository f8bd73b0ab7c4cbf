"""User errors become one line and exit code 2; bugs keep their traceback."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adalora_scale import errors
from adalora_scale.errors import Unsupported, UserError, nearest, run_reporting_errors

ROOT = Path(__file__).resolve().parents[1]


def raising(error):
    def main():
        raise error

    return main


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    monkeypatch.delenv("ADALORA_TRACEBACK", raising=False)
    monkeypatch.delenv("RANK", raising=False)


@pytest.mark.parametrize("kind", [UserError, Unsupported])
def test_user_error_is_one_line_and_exit_code_2(kind, capsys):
    """A message over several lines is lost between the ranks' outputs."""
    assert run_reporting_errors(raising(kind("the key\n   is wrong;\tfix it"))) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: the key is wrong; fix it\n"
    assert captured.out == ""


def test_the_process_exits_with_2_and_no_traceback():
    """Only a real process shows what the launcher sees."""
    code = (
        "import sys; from adalora_scale.errors import UserError, run_reporting_errors\n"
        "def main(): raise UserError('no such file')\n"
        "sys.exit(run_reporting_errors(main))"
    )
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "ADALORA_TRACEBACK")}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (run.returncode, run.stderr, run.stdout) == (2, "error: no such file\n", "")
    environment["ADALORA_TRACEBACK"] = "1"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert run.returncode == 1
    assert "Traceback" in run.stderr


@pytest.mark.parametrize(("result", "code"), [(None, 0), (0, 0), (3, 3)])
def test_a_run_without_error_keeps_its_exit_code(result, code):
    """A verb's own failure (exit code 1 of a check) would be swallowed."""
    assert run_reporting_errors(lambda: result) == code


@pytest.mark.parametrize("error", [ValueError("x"), NotImplementedError("x"), KeyError("x")])
def test_other_errors_are_bugs_and_keep_their_traceback(error):
    """Hiding a bug's traceback makes it unfindable; UserError's own base classes are the tempting mistake."""
    with pytest.raises(type(error)):
        run_reporting_errors(raising(error))


@pytest.mark.parametrize(("value", "raises"), [("1", True), ("yes", True), ("0", False), ("", False)])
def test_traceback_on_request(monkeypatch, value, raises):
    """The variable must switch on with 1 and stay off with 0."""
    monkeypatch.setenv("ADALORA_TRACEBACK", value)
    if raises:
        with pytest.raises(UserError):
            run_reporting_errors(raising(UserError("x")))
    else:
        assert run_reporting_errors(raising(UserError("x"))) == 2


@pytest.mark.parametrize(("rank", "waits", "prefix"), [("0", False, "error: "), ("1", True, "error (rank 1): ")])
def test_other_ranks_speak_after_rank_0(monkeypatch, capsys, rank, waits, prefix):
    """512 ranks would print 512 copies; a rank that fails alone must still speak, and say which it is."""
    slept = []
    monkeypatch.setattr(errors.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", rank)
    started = time.monotonic()
    assert run_reporting_errors(raising(UserError("broken"))) == 2
    assert time.monotonic() - started < 1
    assert capsys.readouterr().err == f"{prefix}broken\n"
    assert bool(slept) == waits
    assert all(1 <= seconds <= 30 for seconds in slept)


def test_nearest_suggests_only_what_is_near():
    """A far-fetched suggestion is worse than none."""
    assert nearest("init_s", ["init_r", "target_r"]) == " Did you mean 'init_r'?"
    assert nearest("zzzz", ["init_r", "target_r"]) == ""
    assert nearest("x", []) == ""
