"""The command line of the harness; `python -m benchmarks.quality --help` says how to use it."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import sys
import warnings
from pathlib import Path

from adalora_scale.errors import UserError, run_reporting_errors
from benchmarks import quality
from benchmarks.quality import curve
from benchmarks.quality.cell import Cell, Results
from benchmarks.quality.jobs import run_side_by_side
from benchmarks.quality.methods import all_methods
from benchmarks.quality.rates import rates_markdown
from benchmarks.quality.search import missing
from benchmarks.quality.table import markdown, rows_of, short_markdown
from benchmarks.quality.tasks import TASKS, Sources

_ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    """Run what is missing, or print the table."""
    methods = all_methods()
    parser = argparse.ArgumentParser(
        "python -m benchmarks.quality",
        description=quality.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "action",
        choices=("run", "table", "curve", "rates"),
        help="curve: one run's adapter cut to ten sizes; rates: every trial of a learning rate",
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=_ROOT / "benchmarks" / "results" / "quality",
        metavar="DIR",
        help="a file of JSON lines a task; a cell that stands there is not run again",
    )
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), metavar="DIR", help="splits and runs")
    parser.add_argument("--shared", type=Path, default=_ROOT.parent / "shared", metavar="DIR", help="models/, data/")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="NAME", help=", ".join(TASKS))
    parser.add_argument(
        "--methods", nargs="+", choices=methods, default=list(methods), metavar="NAME", help=", ".join(methods)
    )
    parser.add_argument("--budgets", nargs="+", type=int, default=[1, 2, 8], metavar="R", help="as ranks of LoRA")
    parser.add_argument(
        "--seeds", type=int, default=5, help="of the chosen setting; table: a row has at least these (default 5)"
    )
    parser.add_argument(
        "--split",
        choices=("validation", "test"),
        default="validation",
        help="table: what to show; test only when nothing is left to decide (default validation)",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="run: cells side by side (default 1)")
    parser.add_argument(
        "--against",
        choices=methods,
        metavar="NAME",
        help="table: the method that differences are from (default: each task's own, lora but for the mixture)",
    )
    parser.add_argument("--short", action="store_true", help="table: our default beside LoRA, in one table")
    parser.add_argument("--json", type=Path, metavar="FILE", help="table: also write the rows as JSON")
    arguments = parser.parse_args()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    actions = {"run": _run, "table": _table, "curve": _curve, "rates": _rates}
    return run_reporting_errors(lambda: actions[arguments.action](arguments))


def _curve(arguments: argparse.Namespace) -> int:
    sources, method = Sources(arguments.shared.resolve(), _ROOT), all_methods()[curve.METHOD]
    done = {(row["task"], row["target_r"], row["seed"]) for row in curve.curve_rows(arguments.results)}
    for name, target_r, seed in itertools.product(arguments.tasks, arguments.budgets, range(arguments.seeds)):
        if (name, target_r, seed) in done:
            continue
        work = arguments.work / "curve"
        rows = curve.run_curve(TASKS[name], method, target_r, seed, arguments.results, sources, work)
        said = ", ".join(f"{row['share']:.0%} {row['loss']:.3f}" for row in rows)
        print(f"{name} r {target_r} seed {seed}: {said}", flush=True)
    print(curve.curve_markdown([TASKS[name] for name in arguments.tasks], arguments.results))
    return 0


def _run(arguments: argparse.Namespace) -> int:
    sources = Sources(arguments.shared.resolve(), _ROOT)
    tasks = [TASKS[name] for name in arguments.tasks]
    known = Results(arguments.results)

    def left() -> list[Cell]:
        return list(missing(tasks, arguments.methods, arguments.budgets, arguments.seeds, known))

    failed = run_side_by_side(left, known, sources, arguments.work, arguments.jobs)
    print(f"{len(failed)} cells failed; {len(left())} are missing", flush=True)
    return 1 if failed else 0


def _table(arguments: argparse.Namespace) -> int:
    methods = all_methods()
    tasks = [TASKS[name] for name in arguments.tasks]
    known = Results(arguments.results)
    if arguments.short and arguments.against:
        raise UserError("--short shows our default beside LoRA; leave out --against, or --short.")
    rows = rows_of(
        tasks, arguments.methods, arguments.budgets, arguments.seeds, arguments.split, known, arguments.against
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    if arguments.short:
        print(short_markdown(rows, "default"))
        return 0
    print(markdown(rows, {name: method.label for name, method in methods.items()}))
    return 0


def _rates(arguments: argparse.Namespace) -> int:
    tasks = [TASKS[name] for name in arguments.tasks]
    labels = {name: method.label for name, method in all_methods().items()}
    print(rates_markdown(tasks, arguments.methods, arguments.budgets, Results(arguments.results), labels))
    return 0


if __name__ == "__main__":
    sys.exit(main())
