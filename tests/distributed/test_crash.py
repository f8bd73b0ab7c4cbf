"""Runs of two ranks under attack end as the undisturbed one; benchmarks/crash_test.py does it."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.shows("features", feature="killed and damaged at random, same end", engine="{engine}")
@pytest.mark.full
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3"])
@pytest.mark.timeout(2400)
def test_runs_under_attack_end_bit_for_bit_like_the_undisturbed_one(engine, request):
    """Else a preempted week leaves another model than the same week undisturbed."""
    if engine.startswith("zero"):
        request.getfixturevalue("deepspeed_ops")
    command = [sys.executable, "benchmarks/crash_test.py", "--engines", engine, "--rounds", "3", "--seed", "2"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| **rounds** | " in result.stdout


@pytest.mark.full
@pytest.mark.timeout(2400)
def test_one_run_killed_many_times_ends_bit_for_bit_like_the_undisturbed_one():
    """What each restart loses or repeats adds up, and shows after many."""
    options = ["--rounds", "1", "--chain", "6", "--steps", "40", "--engines", "ddp", "--attacks", "kill"]
    command = [sys.executable, "benchmarks/crash_test.py", *options]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert ": equal (" in result.stdout
