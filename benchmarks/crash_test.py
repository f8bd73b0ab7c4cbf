"""Kill a run again and again, inside saving too, resume it each time, and compare with a run that nobody disturbed.

    python benchmarks/crash_test.py                                   20 kills of 2 ranks, DDP
    python benchmarks/crash_test.py --engine zero3 --kills 8          any engine: ddp fsdp2 zero2 zero3

Every kill is SIGKILL, to all processes of the run or to one rank alone, at a random moment: after a random number of
steps, or a few milliseconds after a checkpoint was begun. Prints one line a kill and the tally; exit code 1 unless the
final adapter, the metrics and the allocations are those of the undisturbed run, bit for bit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MARK = "ADALORA_CRASH_TEST"
ENGINES = {
    "ddp": [],
    "fsdp2": ["engine.name=fsdp2"],
    "zero2": ["--deepspeed", str(ROOT / "configs/deepspeed/zero2.json")],
    "zero3": ["--deepspeed", str(ROOT / "configs/deepspeed/zero3.json")],
}


class Run:
    """One start of launch/train.py under torchrun; `folder` is the output_dir that all starts share."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.folder = folder
        arguments = [
            "--config", "configs/recipes/quickstart.yaml", *ENGINES[options.engine], f"training.output_dir={folder}",
            f"training.max_steps={options.steps}", "training.logging_steps=3", "training.save_steps=2",
            "training.save_total_limit=3", "adalora.deltaT=2", "training.resume_from_checkpoint=auto",
            "training.eval_strategy=no", "data.max_train_samples=400", "data.max_eval_samples=8",
        ]  # fmt: skip
        launcher = ["-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
        command = [sys.executable, *launcher, "--nproc-per-node", str(options.ranks), "launch/train.py", *arguments]
        fixed = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), MARK: str(folder)}
        self.log = folder.with_suffix(".log")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=os.environ | fixed, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def processes(self) -> Iterator[int]:
        """Yield every live process of the run, ranks first started last."""
        mark = f"{MARK}={self.folder}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    yield int(entry.name)

    def ranks(self) -> list[int]:
        """Return the processes that train."""
        found = []
        for pid in self.processes():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[2:3] == [b"launch/train.py"]:
                    found.append(pid)
        return found

    def kill(self, pids: list[int] | None = None) -> None:
        """Kill these processes, then whatever is left."""
        for pid in pids or []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if pids:
            time.sleep(0.3)  # the others notice, or are about to
        while left := list(self.processes()):
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()

    def partial(self) -> list[str]:
        """Return the checkpoints in the making."""
        return [path.name for path in self.folder.glob(".checkpoint-*.partial")]

    def newest(self) -> int:
        """Return the step of the newest complete checkpoint, 0 for none."""
        names = [p.parent.name for p in self.folder.glob("checkpoint-*/manifest.json")]
        return max((int(name.removeprefix("checkpoint-")) for name in names), default=0)


def kill_at_random(run: Run, draw: random.Random, options: argparse.Namespace) -> str | None:
    """Kill a started run at a random moment and say where; None when it ended before."""
    inside, alone = draw.random() < 0.5, draw.random() < 0.3
    begin, steps = run.newest(), draw.randrange(1, 4)
    while run.process.poll() is None and run.newest() < begin + 2 * steps - 1:
        if inside and run.newest() >= begin + 2 * (steps - 1) and run.partial():
            break
        time.sleep(0.0005)
    time.sleep(draw.random() * (0.02 if inside else 0.5))
    if run.process.poll() is not None:
        return None
    ranks = run.ranks()
    run.kill([draw.choice(ranks)] if alone and ranks else None)
    where = f"inside saving {run.partial()[0]}" if run.partial() else "between checkpoints"
    return f"{where} ({'one rank' if alone else 'all ranks'}); newest complete: {run.newest()}"


def records(path: Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines without what the clock decides."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [{k: v for k, v in row.items() if "runtime" not in k and "per_second" not in k} for row in rows]


def main() -> int:
    """Run the test and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--engine", choices=ENGINES, default="ddp")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    options = parser.parse_args()
    work = options.folder or Path(tempfile.mkdtemp(prefix="crash_test_"))
    work.mkdir(parents=True, exist_ok=True)
    draw, inside, kills = random.Random(options.seed), 0, 0
    run = Run(work / "undisturbed", options)
    try:
        if run.process.wait() != 0:
            print(f"the undisturbed run failed, see {run.log}")
            return 1
        while True:
            run = Run(work / "killed", options)
            said = kill_at_random(run, draw, options) if kills < options.kills else None
            if said is None:
                break
            kills += 1
            inside += "inside" in said
            print(f"kill {kills:2}: {said}", flush=True)
        code = run.process.wait()
    finally:
        run.kill()
    if code != 0:
        print(f"the run failed after {kills} kills, see {run.log}")
        return 1
    one, other = work / "undisturbed", work / "killed"
    name = "adapter_model.safetensors"
    same = {
        "adapter": (one / name).read_bytes() == (other / name).read_bytes(),
        "metrics": records(one / "metrics.jsonl") == records(other / "metrics.jsonl"),
        "allocations": records(one / "ranks.jsonl") == records(other / "ranks.jsonl"),
    }
    verdicts = ", ".join(f"{key} {'equal' if value else 'DIFFERENT'}" for key, value in same.items())
    print(f"{options.engine} on {options.ranks} ranks, {options.steps} steps: {kills} kills, {inside} inside saving")
    print(f"against the undisturbed run, bit for bit: {verdicts}")
    if all(same.values()) and kills == options.kills:
        if options.folder is None:
            shutil.rmtree(work)
        return 0
    if kills != options.kills:
        print(f"the run ended after {kills} of {options.kills} kills; give it more --steps")
    return 1


if __name__ == "__main__":
    sys.exit(main())
