"""launch/torchrun.sh on this host: signals reach the ranks, and a container that is started again goes on."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.small_run import ARGUMENTS, assert_same, read_result, wait_for_step
from tests.conftest import ROOT


def start(folder, *arguments, **variables):
    """Start launch/torchrun.sh with two ranks, its words in `folder`/said.log."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("ADALORA_", "SLURM_", "TORCHELASTIC", "PET_"))}
    environment = kept | {
        "ADALORA_VENV": str(Path(sys.executable).parents[1]), "ADALORA_LOG_DIR": str(folder / "logs"),
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    } | variables  # fmt: skip
    with open(folder / "said.log", "ab") as log:
        return subprocess.Popen(
            ["bash", "launch/torchrun.sh", *ARGUMENTS, f"training.output_dir={folder}/out", *arguments],
            cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip


def end(process):
    """Nothing may outlive a test."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.full
def test_a_pod_that_is_told_to_end_goes_on_after_its_restart(tmp_path, one_process_result):
    """The kubelet sends SIGTERM to the container's first process, this script; bash alone would pass it to nobody."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pod = {
        "PET_NNODES": "1:1", "PET_NPROC_PER_NODE": "2", "PET_MAX_RESTARTS": "5", "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"localhost:{port}", "PET_RDZV_ID": "adalora",
    }  # fmt: skip
    process = start(tmp_path, **pod)
    try:
        wait_for_step(tmp_path / "out", 8, alive=lambda: process.poll() is None)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 85, (tmp_path / "said.log").read_text()[-3000:]
        assert list((tmp_path / "out").glob("checkpoint-*")) and (tmp_path / "out" / "requeue").exists()
        process = start(tmp_path, **pod)
        assert process.wait(240) == 0, (tmp_path / "said.log").read_text()[-3000:]
    finally:
        end(process)
    assert "resumed from" in (tmp_path / "said.log").read_text()
    assert "first failure" not in (tmp_path / "said.log").read_text()
    result = read_result(tmp_path / "out")
    assert result.world_size == 2
    assert_same(result, one_process_result, tolerance=1e-5)


@pytest.mark.full
def test_usr1_to_the_script_reaches_the_ranks_and_not_torchrun(tmp_path):
    """torchrun dies of SIGUSR1 and leaves its ranks behind."""
    process = start(tmp_path, GPUS="2")
    try:
        wait_for_step(tmp_path / "out", 4, alive=lambda: process.poll() is None)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 85, (tmp_path / "said.log").read_text()[-3000:]
    finally:
        end(process)
    assert "SIGUSR1: checkpoint-" in (tmp_path / "said.log").read_text()
    assert (tmp_path / "out" / "requeue").exists()


@pytest.mark.full
def test_a_run_that_was_given_up_has_its_own_exit_code(tmp_path):
    """torchrun turns every code of its ranks into 1, and what starts failed jobs again would start it for ever."""
    process = start(tmp_path, "training.learning_rate=1e30", "training.max_skipped_steps=2", GPUS="2")
    try:
        assert process.wait(240) == 3, (tmp_path / "said.log").read_text()[-3000:]
    finally:
        end(process)
    assert "the last 2 steps had no finite gradient" in (tmp_path / "said.log").read_text()
    assert (tmp_path / "out" / "wrong-end.json").exists()
