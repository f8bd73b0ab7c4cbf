"""The README's first command, as a newcomer types it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sizes import assert_budget_spent

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(900)
def test_the_quickstart_learns_its_task_and_shows_it(tmp_path):
    """Held-out exact match at most 10 % before and at least 60 % after; plain LoRA's figure and the ranks beside it."""
    # A copy, so that a developer's own runs/quickstart stays; the environment is the one the tests run in.
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if name.startswith(("adalora_scale/", "launch/", "configs/", "benchmarks/")) and os.path.lexists(ROOT / name):
            target = tmp_path / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target, follow_symlinks=False)
    (tmp_path / "launch" / "setup.sh").write_text("exit 0\n")
    environment = os.environ | {"ADALORA_VENV": sys.prefix, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "launch/quickstart.sh"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=850
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "gemm_4bit_forward" not in done.stdout + done.stderr  # a newcomer needs no optional kernel
    before, after = (
        json.loads((tmp_path / "runs" / f"quickstart.{name}.json").read_text()) for name in ("before", "after")
    )
    assert before["exact_match"] <= 0.10
    assert after["exact_match"] >= 0.60
    assert json.loads((tmp_path / "runs" / "quickstart-lora" / "run.json").read_text())["exact_match"] > 0.5
    budget = json.loads((tmp_path / "runs" / "quickstart" / "run.json").read_text())["budget"]
    assert_budget_spent(budget)
    assert f"{budget['spent']:,}" in done.stdout
    assert f"{after['exact_match']:.1%}" in done.stdout
    assert "plain LoRA" in done.stdout and "down_proj" in done.stdout
