"""The run that the cluster tests train everywhere: the quickstart's model, a global batch of 16, and its comparison."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.sizes import assert_budget_spent

STEPS = 60
ARGUMENTS = [
    "--config", "configs/recipes/quickstart.yaml", f"training.max_steps={STEPS}", "training.logging_steps=2",
    "adalora.deltaT=2", "adalora.tinit=6", "adalora.tfinal=30", "training.global_batch_size=16",
    "training.per_device_train_batch_size=8", "data.max_eval_samples=100",
]  # fmt: skip


@dataclass(frozen=True)
class Result:
    """What a finished run left."""

    ranks: dict[str, int]
    budget: dict[str, Any]
    losses: dict[int, float]
    eval_loss: float
    tensors: dict[str, torch.Tensor]
    world_size: int


def read_result(folder: Path) -> Result:
    """Read a finished run's output_dir."""
    summary = json.loads((folder / "run.json").read_text())
    return Result(
        summary["ranks"],
        summary["budget"],
        losses(folder),
        summary["final"]["eval_loss"],
        load_file(folder / "adapter_model.safetensors"),
        summary["world_size"],
    )


def losses(folder: Path) -> dict[int, float]:
    """{step: loss}, as far as the run is."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return {}
    records = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return {record["step"]: record["loss"] for record in records if "loss" in record}


def assert_same(result: Result, expected: Result, *, tolerance: float) -> None:
    """Same ranks of every matrix, and losses and weights within `tolerance` in norm."""
    assert result.ranks == expected.ranks
    assert result.budget == expected.budget
    assert_budget_spent(result.budget)
    assert result.losses.keys() == expected.losses.keys() and len(result.losses) == STEPS // 2
    assert list(result.losses.values()) == pytest.approx(list(expected.losses.values()), rel=max(10 * tolerance, 1e-6))
    assert result.tensors.keys() == expected.tensors.keys()
    difference = sum(
        (value.double() - expected.tensors[k].double()).square().sum() for k, value in result.tensors.items()
    )
    total = sum(value.double().square().sum() for value in expected.tensors.values())
    assert (difference / total).sqrt().item() <= tolerance


def train_alone(folder: Path, *overrides: str) -> Result:
    """Train the run in one process, no launcher."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("ADALORA_", "SLURM_"))}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "launch/train.py", *ARGUMENTS, f"training.output_dir={folder}", *overrides],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return read_result(folder)


def wait_for_step(folder: Path, step: int, *, alive: Callable[[], bool], timeout: float = 150) -> None:
    """Wait until a run has logged `step`.

    Raises:
        AssertionError: the run ended before, or the time is up.
    """
    deadline = time.monotonic() + timeout
    while max(losses(folder), default=0) < step:
        assert alive(), f"the run ended before step {step}"
        assert time.monotonic() < deadline, f"no step {step} within {timeout} s"
        time.sleep(0.1)
