"""A run that is killed and resumed again and again ends as the undisturbed one; benchmarks/crash_test.py does it."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.full
@pytest.mark.parametrize(
    ("engine", "kills", "steps"), [("ddp", 2, 16), *((engine, 6, 40) for engine in ("fsdp2", "zero2", "zero3"))]
)
@pytest.mark.timeout(2400)
def test_killed_runs_end_bit_for_bit_like_the_undisturbed_one(engine, kills, steps, request):
    """Else a preempted week leaves another model than the same week undisturbed."""
    if engine.startswith("zero"):
        request.getfixturevalue("deepspeed_ops")
    command = [sys.executable, "benchmarks/crash_test.py", "--engine", engine, "--kills", str(kills)]
    result = subprocess.run([*command, "--steps", str(steps)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{kills} kills" in result.stdout
    assert "adapter equal, metrics equal, allocations equal" in result.stdout
