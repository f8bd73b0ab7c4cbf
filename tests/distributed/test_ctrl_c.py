"""Ctrl-C in a terminal, where every process of the launch gets it at once: a line, a checkpoint, exit code 130."""

import os
import pty
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest

from adalora_scale.checkpoint.format import checkpoints
from tests.conftest import ROOT
from tests.training.short_run import BASE, RECIPE, assert_same

LAUNCHERS = {
    "one process": ["-m", "adalora_scale", "train"],
    "two ranks": ["-m", "adalora_scale.cluster.launching.torchrun", "--standalone", "--local-addr", "127.0.0.1",
                  "--nproc-per-node", "2", "launch/train.py"],
}  # fmt: skip
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
GOES_ON = re.compile(
    r"SIGINT: checkpoint-\d+ is written; resume_from_checkpoint=auto goes on from it"
    r"|SIGINT (before the first step|in the final evaluation): (there is no checkpoint yet|resume_from_checkpoint=auto)"
    r"|SIGINT came when results were being written"
)
ANSWER_S = 120


def command_of(launcher, folder):
    names = [f"training.output_dir={folder}/out", "training.resume_from_checkpoint=auto", "training.logging_steps=1"]
    return [sys.executable, *LAUNCHERS[launcher], "--config", str(RECIPE), *BASE, *names]


def environment():
    mine = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    return mine | ENVIRONMENT


class Terminal:
    """A command in a pseudo-terminal of its own."""

    def __init__(self, command):
        self.said = ""
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execvpe(command[0], command, environment())

    def read_until(self, done, seconds=ANSWER_S):
        """Read until `done()` or the command's end; whether it goes on."""
        deadline = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < deadline, self.said
            if select.select([self._fd], [], [], 0.05)[0]:
                try:
                    chunk = os.read(self._fd, 65536)
                except OSError:
                    chunk = b""
                if not chunk:
                    return False
                self.said += chunk.decode(errors="replace")
        return True

    def press(self):
        os.write(self._fd, b"\x03")

    def end(self):
        """Read to the end, and return the exit code."""
        self.read_until(lambda: False)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def kill(self):
        try:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


@pytest.mark.parametrize("launcher", ["two ranks", pytest.param("one process", marks=pytest.mark.full)])
def test_ctrl_c_in_training_writes_a_checkpoint(launcher, tmp_path):
    """All that is left behind the figures is a line that says from where to go on."""
    terminal = Terminal(command_of(launcher, tmp_path))
    try:
        assert terminal.read_until(lambda: "step 3/" in terminal.said), terminal.said
        terminal.press()
        code = terminal.end()
    finally:
        terminal.kill()
    assert code == 130, terminal.said
    assert "Traceback" not in terminal.said
    assert GOES_ON.search(terminal.said)[0].startswith("SIGINT: checkpoint-"), terminal.said
    assert len(checkpoints(tmp_path / "out")) >= 1
    assert not (tmp_path / "out" / "requeue").exists()  # a person who ends it does not want it back in a queue


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Runs that nobody ended, by launcher; made when they are asked for."""
    made = {}

    def run(launcher):
        if launcher not in made:
            folder = tmp_path_factory.mktemp("undisturbed")
            subprocess.run(command_of(launcher, folder), cwd=ROOT, env=environment(), check=True, capture_output=True)
            made[launcher] = folder / "out"
        return made[launcher]

    return run


@pytest.mark.full
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("draw", range(10))
def test_ctrl_c_at_any_moment_ends_in_the_same_run(draw, launcher, tmp_path, undisturbed):
    """Imports, rows, loading, training, saving: either nothing was there to save, or the run goes on bit for bit."""
    straight = undisturbed(launcher)
    terminal = Terminal(command_of(launcher, tmp_path))
    try:
        begun = terminal.read_until(lambda: (tmp_path / "out" / "lease.json").exists())
        assert begun, terminal.said
        wait = time.monotonic() + random.Random(draw).uniform(0, 25)
        going = terminal.read_until(lambda: time.monotonic() > wait)
        if going:
            terminal.press()
        code = terminal.end()
    finally:
        terminal.kill()
    assert code in (0, 130), terminal.said
    assert "Traceback" not in terminal.said, terminal.said
    # torchrun ends by 130 also where its ranks had said that all is done and had nothing left but to exit.
    if code == 130 and "done: " not in terminal.said:
        assert GOES_ON.search(terminal.said), terminal.said
        subprocess.run(command_of(launcher, tmp_path), cwd=ROOT, env=environment(), check=True, capture_output=True)
    assert_same(tmp_path / "out", straight)
    shutil.rmtree(tmp_path / "out")
