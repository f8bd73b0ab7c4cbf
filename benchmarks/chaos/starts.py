"""One start of launch/train.py on an engine: its processes, what it said, and how it ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.chaos.folder import newest_whole, partials

ROOT = Path(__file__).resolve().parents[2]
SAVE_STEPS = 2
REQUEUE = "requeue"
MANY = 1000
"""Checkpoints that the undisturbed run keeps: all."""
_MARK = "ADALORA_CRASH_TEST"


@dataclass(frozen=True)
class Engine:
    """How a run is started: ranks (1: without a launcher) and arguments."""

    ranks: int
    arguments: tuple[str, ...] = ()


ENGINES = {
    "one": Engine(1),
    "ddp": Engine(2),
    "fsdp2": Engine(2, ("engine.name=fsdp2",)),
    "zero2": Engine(2, ("--deepspeed", "configs/deepspeed/zero2.json")),
    "zero3": Engine(2, ("--deepspeed", "configs/deepspeed/zero3.json")),
}


@dataclass(frozen=True, kw_only=True)
class Run:
    """What all starts of one run share."""

    engine: str
    folder: Path
    """output_dir."""
    base: Path
    steps: int
    timeout: float
    """Seconds a start may take."""
    keep: int = 3
    """training.save_total_limit."""
    script: str = "launch/train.py"

    def command(self) -> list[str]:
        """Return the command line of a start."""
        engine = ENGINES[self.engine]
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1", "--nproc-per-node"]
        return [
            sys.executable, *([*launcher, str(engine.ranks)] if engine.ranks > 1 else []), self.script,
            "--config", "configs/recipes/quickstart.yaml", *engine.arguments, f"training.output_dir={self.folder}",
            f"model.model_name_or_path={self.base}", f"training.max_steps={self.steps}", "training.logging_steps=3",
            f"training.save_steps={SAVE_STEPS}", f"training.save_total_limit={self.keep}", "adalora.deltaT=2",
            "training.resume_from_checkpoint=auto", "training.eval_strategy=no", "data.max_train_samples=400",
            "data.max_eval_samples=8",
        ]  # fmt: skip


@dataclass(frozen=True)
class Ending:
    """How a start ended, read off its exit codes, its log and the note `requeue`."""

    code: int
    """Of the process that was started: the launcher's, or the one rank's."""
    codes: tuple[int, ...]
    """Of the ranks, as far as they are known: torchrun reports those that failed by themselves."""
    requeue: bool
    text: str
    passed_on: int = 0
    """The signal that the launcher says it got and passed on; it then reports no rank's exit code."""
    hung: bool = False

    @property
    def errors(self) -> list[str]:
        """The lines meant for people."""
        return [line for line in self.text.splitlines() if re.match(r"error( \(rank \d+\))?: ", line)]

    @property
    def traceback(self) -> bool:
        """Whether a rank died with one; the launcher's own, about its ranks, does not count."""
        return bool(re.search(rf'File "{re.escape(str(ROOT))}/(launch|adalora_scale)/', self.text))

    @property
    def resumed(self) -> int | None:
        """The step that the start went on from."""
        found = re.search(r"^resumed from \S*checkpoint-\d+ \(step (\d+) of", self.text, re.MULTILINE)
        return int(found.group(1)) if found else None

    @property
    def trained(self) -> bool:
        """Whether the start came as far as a model with adapters."""
        return "AdaLoRA on " in self.text

    @property
    def kind(self) -> str:
        """One word.

        done: to its end. refused: exit code 2 and a line. checkpointed: 85 (or what a launcher made of it) with the
        note `requeue`; stopped: 85 without. interrupted: 130. killed: by a signal it had no handler for. hung. broken.
        """
        finished = self.passed_on and re.search("^done: ", self.text, re.MULTILINE) and not self.traceback
        if self.hung:
            return "hung"
        if self.code == 0 or finished:
            return "done"
        if self.traceback:
            return "broken"
        if self.requeue:
            return "checkpointed"
        if 2 in self.codes and self.errors:  # the launcher then asks the other ranks to end: 85
            return "refused"
        if 85 in self.codes:
            return "stopped"
        if 130 in self.codes or self.passed_on == signal.SIGINT:
            return "interrupted"
        return "killed" if any(code < 0 for code in self.codes) else "broken"


@dataclass
class Start:
    """A start that runs; its log is `log`, and every process of it carries the log's name in its environment."""

    run: Run
    log: Path
    began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        fixed = {
            "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1",
            "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
            "DS_ACCELERATOR": "cpu", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "20", "GLOO_SOCKET_IFNAME": "lo",
            _MARK: str(self.log),
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",  # ninja, for DeepSpeed
        }  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self.run.command(),
                cwd=ROOT,
                env=os.environ | fixed,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    # ---- while it runs ------------------------------------------------------------------------------------------

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self.process.poll() is not None

    @property
    def age(self) -> float:
        """Seconds since it began."""
        return time.time() - self.began

    def text(self) -> str:
        """Return its log so far."""
        return self.log.read_text(errors="replace")

    def processes(self) -> Iterator[int]:
        """Yield every live process of the start."""
        mark = f"{_MARK}={self.log}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)

    def ranks(self) -> list[int]:
        """Return the processes that train, none while the launcher has not made them."""
        found = {}
        for pid in self.processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if self.run.script.encode() in words[1:3]:  # torchrun starts them with -u
                    found[pid] = int(stat_of(pid)[1])
        return sorted(pid for pid, parent in found.items() if parent not in found)  # a rank's fork looks like it

    def send(self, pids: Iterable[int], number: int) -> None:
        """Send a signal to those that are still there."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def catches(self, pid: int, number: int) -> bool:
        """Return whether a process has a handler for a signal, as the kernel says."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/status").read_text().splitlines():
                if line.startswith("SigCgt:"):
                    return bool(int(line.split()[1], 16) >> (number - 1) & 1)
        return False

    def kill(self) -> None:
        """Kill what is left of it."""
        while left := list(self.processes()):
            self.send(left, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()
        if builds := os.environ.get("TORCH_EXTENSIONS_DIR"):  # private to the command; nobody else builds there
            for lock in Path(builds).rglob("lock"):
                lock.unlink(missing_ok=True)

    def partial(self) -> list[str]:
        """Return the checkpoints in the making."""
        return partials(self.run.folder)

    def newest(self) -> int:
        """Return the step of the newest complete checkpoint, 0 for none."""
        return newest_whole(self.run.folder)

    # ---- its end ------------------------------------------------------------------------------------------------

    def end(self, timeout: float | None = None) -> Ending:
        """Wait for its end; one that does not come in time leaves the stacks of its ranks in the log."""
        hung = False
        try:
            self.process.wait(timeout or max(1.0, self.run.timeout - self.age))
        except subprocess.TimeoutExpired:
            hung = True
            self.send(self.ranks(), signal.SIGABRT)  # faulthandler writes the stacks
            time.sleep(2.0)
        self.kill()
        text, code = self.text(), self.process.returncode
        alone = ENGINES[self.run.engine].ranks == 1
        codes = [code] if alone else [int(found) for found in re.findall(r"exitcode\s*:\s*(-?\d+)", text)]
        note = self.run.folder / REQUEUE
        fresh = note.exists() and note.stat().st_mtime >= self.began - 0.1
        passed_on = None if alone else re.search(r"got signal: (\d+)", text)
        return Ending(code, tuple(codes), fresh, text, int(passed_on.group(1)) if passed_on else 0, hung)


def stat_of(pid: int) -> list[str]:
    """Return what the kernel says of a process after its name: state, parent, …, see proc(5).

    Raises:
        OSError: there is no such process.
    """
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
