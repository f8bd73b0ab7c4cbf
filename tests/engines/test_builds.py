"""Waits for torch's extension builds end, with the file's name, when the build was killed, and only then."""

import os
import subprocess
import sys
import threading
import time

import pytest
from torch.utils.file_baton import FileBaton

from adalora_scale.engines.builds import bounded_build_waits
from adalora_scale.errors import UserError
from tests.conftest import ROOT


@pytest.fixture
def lock(tmp_path):
    path = tmp_path / "deepspeed_shm_comm" / "lock"
    path.parent.mkdir()
    path.touch()
    (path.parent / "build.ninja").touch()
    return path


def make_old(lock, seconds=3600):
    for path in lock.parent.glob("*"):
        os.utime(path, (time.time() - seconds,) * 2)


def test_a_lock_of_a_killed_build_is_named(lock):
    """Else a run waits without end and without a word, as the quickstart did."""
    make_old(lock)
    with bounded_build_waits(stale_after=1.0), pytest.raises(UserError, match=f"{lock} was left behind .* delete it"):
        FileBaton(str(lock)).wait()


def test_a_lock_that_grows_old_while_we_wait_is_named_too(lock, capsys):
    """Else a build that is killed while others wait for it holds them for ever; and nobody is told what for."""
    with bounded_build_waits(note_after=0.2, stale_after=1.0), pytest.raises(UserError, match="was left behind"):
        FileBaton(str(lock)).wait()
    assert f"waiting for {lock}" in capsys.readouterr().err


def test_a_build_that_a_process_here_still_runs_is_waited_for(lock):
    """Else one long compilation ends every other run on the machine."""
    make_old(lock)
    builder = FileBaton(str(lock))
    lock.unlink()
    assert builder.try_acquire()
    make_old(lock)
    threading.Timer(2.5, builder.release).start()
    with bounded_build_waits(stale_after=0.5):
        FileBaton(str(lock)).wait()
    assert not lock.exists()


def test_a_build_elsewhere_that_writes_files_is_waited_for(lock):
    """Else a build on another machine, whose process nobody sees here, is called dead."""
    make_old(lock)

    def build():
        for number in range(8):
            (lock.parent / f"{number}.o").touch()
            time.sleep(0.4)
        lock.unlink()

    thread = threading.Thread(target=build)
    thread.start()
    with bounded_build_waits(stale_after=1.0):
        FileBaton(str(lock)).wait()
    thread.join()
    assert not lock.exists()


def test_torch_waits_as_before_afterwards():
    """Else importing this package changes how every other extension of the process is built."""
    before = FileBaton.wait
    with bounded_build_waits():
        assert FileBaton.wait is not before
    assert FileBaton.wait is before


def test_a_run_under_deepspeed_ends_with_the_file_s_name(stories260k, data_dir, lock, tmp_path):
    """Else the bound does not reach the place where DeepSpeed compiles."""
    make_old(lock)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
        str(ROOT / "launch" / "train.py"), "--config", str(ROOT / "configs/recipes/sgd_chat_stories260k.yaml"),
        f"model.model_name_or_path={stories260k}", f"data.train={data_dir}/sgd_chat/train.jsonl", "data.eval=null",
        f"training.output_dir={tmp_path / 'out'}", "training.eval_strategy=no", "training.max_steps=4",
        "engine.name=deepspeed", f"engine.config={ROOT / 'configs/deepspeed/zero2.json'}",
    ]  # fmt: skip
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(lock.parent.parent)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode != 0
    assert f"error: {lock} was left behind by a build that was killed" in ended.stderr, ended.stderr[-3000:]
