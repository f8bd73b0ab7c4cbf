"""The benchmarks of 4-bit bases, run as a user runs them, on shapes that take seconds."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(script, *options, timeout=400):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, options)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, timeout=timeout, capture_output=True, text=True, check=False
    )


def load(script):
    spec = importlib.util.spec_from_file_location(script.removesuffix(".py"), ROOT / "benchmarks" / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_qlora_steps_of_a_tiny_shape(tmp_path):
    """The script that a lent GPU runs must not turn out broken there."""
    output = tmp_path / "figures.json"
    done = run("qlora_step.py", "--shape", "tiny", "--tokens", 32, "--micro-batch", 2, "--steps", 2, "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(output.read_text())
    assert figures["passed"] and len(figures["checks"]) == 8
    off, on = figures["runs"]
    assert not off["gradient_checkpointing"] and on["gradient_checkpointing"]
    assert off["tokens_per_second"] == pytest.approx(64 / off["median_seconds"])
    assert figures["versions"]["bitsandbytes"] and figures["hardware"]["device"] == "cpu"
    assert str(ROOT) not in output.read_text()


def test_qlora_names_what_it_cannot_use():
    """A wrong option is one line and exit code 2, as everywhere."""
    done = run("qlora_step.py", "--device", "cuda")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].endswith("--device=cuda, but torch sees no GPU.")


def test_model_flops_are_those_of_the_matrices():
    """Llama 3 70B has 69.5 billion weights in matrices that multiply, embeddings not counted."""
    flops = load("qlora_step.py").model_flops
    assert flops("70b", 0) == 4 * (80 * (2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672) + 8192 * 128256)
    assert flops("70b", 4096) - flops("70b", 0) == 6 * 80 * 8192 * 4096


@pytest.mark.full
def test_loading_stays_within_its_memory_on_two_ranks(tmp_path):
    """A loader that holds the model, or keeps what it freed, shows here and not first at 70 B."""
    output = tmp_path / "figures.json"
    options = ["--gigabytes", 0.3, "--vocabulary", 8000, "--engine", "fsdp2", "--four-bit", "--output", output]
    done = run("load_memory.py", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    (figures,) = json.loads(output.read_text())["runs"]
    for rank in figures["ranks"]:
        assert (rank["peak_verdict"], rank["read_verdict"]) == ("pass", "pass")
        # Half of 0.3 GB in 4 bits, with 8-bit scales, the adapters, and an embedding and a head in 16 bits.
        assert 40e6 < rank["shard_bytes"] < 90e6
        assert rank["peak_bytes"] > rank["baseline_bytes"] + rank["shard_bytes"]
    assert str(ROOT) not in output.read_text()


@pytest.mark.parametrize(("engine", "peak", "read", "passed"), [
    ("fsdp2", 160, 55, True), ("fsdp2", 161, 55, False), ("fsdp2", 160, 56, False), ("zero3", 161, 0, False),
    ("zero3", 160, 100, True), ("ddp", 500, None, True),
])  # fmt: skip
def test_a_bound_that_does_not_hold_fails(engine, peak, read, passed):
    """A benchmark that cannot fail says nothing."""
    own = {"baseline_bytes": 100, "shard_bytes": 50, "two_layers_bytes": 10, "peak_bytes": 60, "bytes_read": 0}
    bad = own | {"peak_bytes": peak, "bytes_read": read}
    ranks = [rank | {"peak_at": ""} for rank in (own, bad)]
    assert load("load_memory.py")._judged(ranks, engine, True, 100)["passed"] is passed


@pytest.mark.full
def test_published_memory_is_explained_within_a_tenth(tmp_path):
    """A plan that is far from what others measured, with no reason named, is not believed."""
    output = tmp_path / "figures.json"
    done = run("plan_published.py", "--json", output)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = json.loads(output.read_text())["runs"]
    assert [run["name"] for run in runs[:3]] == ["FSDP", "FSDP, CPU offload", "ZeRO-3"]
    for figures in runs:
        assert figures["float32"] == pytest.approx(figures["reported"], rel=0.1)
        # PEFT's layers and ours keep the same for the backward pass.
        assert figures["PEFT: activations"] == pytest.approx(figures["plan: activations"], rel=0.02)


def test_checkpoints_of_both_kinds_of_a_tiny_shape(tmp_path):
    """Ten minutes of writing must not end in a traceback; at this size the ratio says nothing."""
    output = tmp_path / "figures.json"
    shape = ("--hidden", 64, "--layers", 1, "--r", 4, "--tokens", 8, "--rounds", 2, "--device", "cpu")
    done = run("async_checkpoint.py", *shape, "--folder", tmp_path, "--output", output)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stdout + done.stderr
    figures = json.loads(output.read_text())
    assert len(figures["rounds"]) == 2 and figures["bytes"] > 12 * figures["trainable_parameters"]
    for one in figures["rounds"]:
        assert one["ratio"] == pytest.approx(one["stall s"] / one["synchronous write s"])
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
