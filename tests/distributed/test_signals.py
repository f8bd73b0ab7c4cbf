"""Before the first step a rank cannot know whose SIGTERM it got, a person's or its launcher's: ranks find out."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import ROOT
from tests.training.short_run import BASE, RECIPE

DRIVER = ROOT / "tests" / "distributed" / "workers" / "stalled_run.py"


@pytest.fixture
def stalled(tmp_path):
    """Two ranks under torchrun, waiting for their model: (torchrun, the processes of the ranks)."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    command += ["--nproc-per-node", "2", str(DRIVER), str(tmp_path), "--config", str(RECIPE), *BASE]
    command += [f"training.output_dir={tmp_path}/out", "training.resume_from_checkpoint=auto"]
    fixed = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    with open(tmp_path / "said.log", "wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | fixed, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 180
        while not all((tmp_path / f"rank-{rank}").exists() for rank in range(2)):
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "said.log").read_text()
            time.sleep(0.1)
        time.sleep(0.5)
        ranks = {int(child.environ()["RANK"]): child for child in psutil.Process(process.pid).children()}
        yield process, ranks
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def end_of(process, folder):
    """How it ended, what was said, and the note."""
    process.wait(60)
    note = folder / "out" / "requeue"
    left = sorted(path.name for path in (folder / "out").iterdir()) if (folder / "out").exists() else []
    return (folder / "said.log").read_text(), json.loads(note.read_text()) if note.exists() else None, left


def test_a_signal_to_the_launcher_reaches_all_and_leaves_the_note(stalled, tmp_path):
    process, _ = stalled
    process.send_signal(signal.SIGTERM)
    said, note, left = end_of(process, tmp_path)
    assert note == {"step": None, "signal": "SIGTERM"}, said
    assert "SIGTERM before the first step: there is no checkpoint yet" in said and left == ["requeue"]


def test_usr1_to_one_rank_is_meant_for_the_run(stalled, tmp_path):
    """The other one sees a peer that is gone, and then its launcher's SIGTERM."""
    process, ranks = stalled
    ranks[1].send_signal(signal.SIGUSR1)
    said, note, left = end_of(process, tmp_path)
    assert note is not None and left == ["requeue"], said


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.full)])
def test_what_a_launcher_sends_after_a_failure_is_no_request(rank, stalled, tmp_path):
    """A job whose rank is out of memory at every start would go back into the queue a hundred times."""
    process, ranks = stalled
    ranks[rank].kill()
    said, note, left = end_of(process, tmp_path)
    assert note is None and process.returncode != 0, said
    assert Path(tmp_path / "out" / "requeue").exists() is False
    assert left == [] if rank == 1 else ["lease.json"], said
