"""The chaos command; `python benchmarks/crash_test.py --help` says what it does, benchmarks/chaos/ does it."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, not as a module

from adalora_scale.errors import UserError, run_reporting_errors
from adalora_scale.files import write_json
from adalora_scale.training.records import versions
from benchmarks import chaos
from benchmarks.chaos.attacks import ATTACKS
from benchmarks.chaos.rounds import Result, Round, Undisturbed, can_mount, plans, round_run, undisturbed_run
from benchmarks.chaos.starts import ENGINES
from benchmarks.chaos.table import markdown, tree
from benchmarks.chaos.verdict import Failed

TAIL, WIDTH = 20, 240
"""Lines of a failed start's log that are shown, before the launcher's own, and characters of each."""

LAUNCHER = r"^[WE]\d{4} .*torch/distributed/elastic"
"""Where torchrun begins to report on its ranks."""


def main() -> int:
    """Play the rounds, print a line each and the table, and return the exit code."""
    options = _options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # starts end and disks go on the way out
    work = options.folder or Path(tempfile.mkdtemp(prefix="crash_test_"))
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(work / "torch_extensions"))  # ZeRO's operators build once
    attacks = list(options.attacks)
    if "disk" in attacks and not can_mount(work / "disk"):
        if options.attacks != list(ATTACKS):
            raise UserError("--attacks disk needs the right to mount a small disk; run as root or leave it out.")
        attacks.remove("disk")
        print("left out: disk, which needs the right to mount one", flush=True)
    undisturbed: dict[str, Undisturbed] = {}
    results: list[Result] = []
    drawn = plans(options.seed, options.rounds, options.engines, attacks, options.chain)
    for plan in drawn:
        if options.only not in (None, plan.number):
            continue
        try:
            if plan.engine not in undisturbed:
                found = undisturbed_run(plan.engine, work, steps=options.steps, timeout=options.timeout)
                undisturbed[plan.engine] = found
                print(f"undisturbed {plan.engine}: {found.seconds:.0f} s", flush=True)
        except Failed as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        run = round_run(plan, work, steps=options.steps, timeout=options.timeout)
        result = Round(run, undisturbed[plan.engine], plan, options.seed).play(ATTACKS)
        results.append(result)
        _show(result)
        if options.json:
            words = ["python", "benchmarks/crash_test.py", *sys.argv[1:]]
            write_json(options.json, tree(results, command=" ".join(words), versions=versions()))
    print("\n" + markdown(results))
    failed = [result.plan.number for result in results if result.verdict == "failed"]
    if failed:
        print(f"\nfailed: {', '.join(map(str, failed))} (again: the same command with --only N); logs in {work}")
    elif options.folder is None:
        shutil.rmtree(work)
    return int(bool(failed))


def _show(result: Result) -> None:
    plan = result.plan
    print(f"round {plan.number}: {plan.engine}, {' + '.join(plan.attacks)}: {result.verdict} ({result.seconds:.0f} s)")
    for line in result.said:
        print(f"    {line}")
    if result.reason:
        print(f"    => {result.reason}")
    if result.verdict == "failed" and Path(result.log).exists():
        text = Path(result.log).read_text(errors="replace")
        ranks = re.split(LAUNCHER, text, maxsplit=1, flags=re.MULTILINE)[0].splitlines()
        print("\n".join(f"    | {line[:WIDTH]}" for line in [result.log, *ranks[-TAIL:]]))
    sys.stdout.flush()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=chaos.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="how many (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="what everything is drawn from (default: 0)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["one", "fsdp2", "zero2", "zero3"], help=(
        "one is one process, the others are 2 ranks under torchrun (default: one fsdp2 zero2 zero3)"))  # fmt: skip
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS), help="default: all")
    parser.add_argument("--chain", type=int, help="attacks a round (default: 1 to 3, drawn)")
    parser.add_argument("--only", type=int, metavar="N", help="play the Nth round alone")
    parser.add_argument("--steps", type=int, default=16, help="optimizer steps of a run (default: 16)")
    parser.add_argument("--timeout", type=float, default=240, help="seconds a start may take (default: 240)")
    parser.add_argument("--folder", type=Path, help="where to work; by default a temporary folder")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round there, too")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(run_reporting_errors(main))
