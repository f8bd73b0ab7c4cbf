"""What the toolkit makes of every architecture that transformers can build small.

    python tests/coverage.py                      # all of them; rewrites the table in docs/coverage.md
    python tests/coverage.py --only llama bert    # some; the table is printed

Each architecture gets random weights and small sizes, and is trained, trained in 4 bits, with packed rows and on two
ranks, merged, and opened in PEFT (`tests/architectures/runs.py` says what each must agree with). An architecture is
*right*, *refused* in one line, or *wrong*; the exit code is 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, not as a module

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tests.architectures import runs, table
from tests.architectures.small import kinds

ROOT = Path(__file__).resolve().parents[1]
TOKENIZER = ROOT / "launch" / "quickstart" / "base_model"
SECONDS = 180
"""What one check may take."""


def main() -> int:
    """Run the checks and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="model types, as config.json names them")
    parser.add_argument("--checks", nargs="+", choices=runs.CHECKS, default=list(runs.CHECKS))
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="keep the verdicts; what stands there is not run again"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep what each check printed")
    options = parser.parse_args()
    every = kinds()
    if unknown := set(options.only or ()) - set(every):
        parser.error(f"transformers builds no such causal model or encoder: {', '.join(sorted(unknown))}")
    found: dict[str, dict[str, Any]] = {}
    if options.json and options.json.exists():
        found = json.loads(options.json.read_text())
    chosen = [name for name in every if options.only is None or name in options.only]
    for number, name in enumerate(chosen, start=1):
        if name not in found:
            found[name] = _architecture(name, every[name], options.checks, options.logs)
            if options.json:
                options.json.write_text(json.dumps(found, indent=1))
        print(f"{number}/{len(chosen)} {table.line(name, found[name])}", flush=True)
    if options.only is None:
        table.rewrite(options.page, found)
    else:
        print(table.markdown({name: found[name] for name in chosen}))
    return int(any(word == "wrong" for entry in found.values() for word, _ in entry["checks"].values()))


def _architecture(name: str, kind: str, checks: list[str], logs: Path | None) -> dict[str, Any]:
    entry: dict[str, Any] = {"kind": kind, "built": "", "checks": {}}
    with tempfile.TemporaryDirectory(prefix="coverage_") as made:
        folder = Path(made)
        [(word, reason)] = _children(lambda: _made(name, kind, folder), folder, "build", ranks=1)
        if word != runs.RIGHT:
            return entry | {"built": reason}
        for check in checks:
            if kind == "encoder" and check == "packing":
                continue  # a row is classified as a whole
            if check in ("merge, PEFT", "FSDP2 × 2") and not (folder / "merged").exists():
                continue  # nothing was trained that they could look at
            ranks = 2 if check.startswith("FSDP2") else 1
            entry["checks"][check] = _verdict(check, folder, kind, ranks)
            if entry["checks"][check][0] == "apart":
                entry["checks"][check] = _verdict(runs.REPLICATED, folder, kind, ranks)
        if logs:
            shutil.copytree(
                folder, logs / name, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.safetensors", "tokenizer*")
            )
    return entry


def _verdict(check: str, folder: Path, kind: str, ranks: int) -> tuple[str, str]:
    """Return the worst of the ranks' verdicts."""
    verdicts = _children(lambda: runs.verdict(check, folder, kind), folder, check, ranks=ranks)
    return min(verdicts, key=lambda verdict: ["wrong", "refused", "apart", "right"].index(verdict[0]))


def _made(name: str, kind: str, folder: Path) -> tuple[str, str]:
    try:
        runs.make_base(name, kind, TOKENIZER, folder)
    except Exception as error:
        return "wrong", f"{type(error).__name__}: {error}"
    return runs.RIGHT, ""


def _children(work: Any, folder: Path, check: str, *, ranks: int) -> list[tuple[str, str]]:
    """Do it in a process of its own, or one a rank: a trainer leaves state behind in its process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    sys.stdout.flush()
    processes = []
    for rank in range(ranks):
        result = folder / f"{check}-{rank}.json"
        if (process := os.fork()) == 0:
            try:
                os.setsid()
                log = os.open(folder / f"{check}-{rank}.log", os.O_WRONLY | os.O_CREAT)
                os.dup2(log, 1)
                os.dup2(log, 2)
                if ranks > 1:
                    os.environ |= {
                        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
                        "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                    }  # fmt: skip
                result.write_text(json.dumps(work()))
            finally:
                sys.stdout.flush()
                os._exit(0)
        processes.append((process, result))
    deadline = time.monotonic() + SECONDS
    verdicts = []
    for process, result in processes:
        while os.waitpid(process, os.WNOHANG) == (0, 0):
            if time.monotonic() > deadline:
                for other, _ in processes:
                    os.killpg(other, signal.SIGKILL)
                os.waitpid(process, 0)
                break
            time.sleep(0.05)
        if result.exists() and (text := result.read_text()):
            word, reason = json.loads(text)
            verdicts.append((word, reason))
        else:
            verdicts.append(("wrong", f"no end within {SECONDS} s, or the process was killed"))
    return verdicts


if __name__ == "__main__":
    sys.exit(main())
