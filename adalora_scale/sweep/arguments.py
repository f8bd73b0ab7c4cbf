"""The command line of `adalora-scale sweep`; light, so that --help answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from adalora_scale.config.command_line import add_config_arguments

_EXAMPLES = """
examples:
  adalora-scale sweep --config FILE --output runs/sweep           # five learning rates around the file's
  adalora-scale sweep --config FILE --output runs/sweep \\
    --grid training.learning_rate=1e-4,2e-4,4e-4 --grid adalora.target_r=4,8 --seeds 5
  adalora-scale sweep --config FILE --output runs/sweep --trials 30 \\
    --range training.learning_rate=1e-5..1e-3 --range adalora.lora_alpha=8..64     # Optuna chooses
  … --launcher "torchrun --standalone --nproc-per-node 8"         # every trial on eight GPUs of this machine
  … --jobs 8                                                      # eight trials at a time, a GPU each
  … --sbatch="--nodes=2 --time=04:00:00"                          # every trial a SLURM job of its own

The same command goes on with a sweep that was stopped: what is done is not run again, what was under way resumes from
its last checkpoint, and values added to a grid are run beside the others. FOLDER/table.md has every trial,
FOLDER/best.yaml the winner's config for `adalora-scale train`. Exit code 0: all trials are done, in SLURM's queue or
another call's, 1: some failed or all diverged, 2: wrong use, 85: stopped by a signal.
"""


def add_parser(verbs: Any) -> None:
    """Register the verb."""
    parser = verbs.add_parser(
        "sweep",
        help="try learning rates, ranks or any other values, and keep the best",
        description="Train once for every combination of values (or for those that Optuna proposes), compare the\n"
        "final evaluation, and write a table and the winning config.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser, "the run's YAML file, with evaluation data")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="the sweep's; a folder a trial")
    values = parser.add_argument_group("what is tried")
    values.add_argument(
        "--grid",
        action="append",
        default=[],
        metavar="KEY=V1,V2",
        help="values of a key; several keys give every combination",
    )
    values.add_argument(
        "--range",
        action="append",
        default=[],
        metavar="KEY=LOW..HIGH",
        help="Optuna chooses a number: whole ones evenly, others by their logarithm (evenly from a LOW of 0)",
    )
    values.add_argument("--trials", type=int, metavar="N", help="trials that Optuna proposes, from ranges and grids")
    values.add_argument(
        "--seeds", type=int, default=0, metavar="N", help="then run the best on N more seeds and report the spread"
    )
    values.add_argument(
        "--metric", default="eval_loss", metavar="NAME", help="of the final evaluation (default eval_loss)"
    )
    values.add_argument(
        "--goal", choices=("min", "max"), help="whether less or more is better (default: min for a loss, else max)"
    )
    where = parser.add_argument_group("where it runs")
    where.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed configuration, as launch/train.py takes it")
    where.add_argument(
        "--launcher", metavar="WORDS", help="starts a trial: torchrun …, deepspeed …, accelerate launch …"
    )
    where.add_argument("--jobs", type=int, metavar="N", help="trials at a time, on equal parts of the GPUs (default 1)")
    where.add_argument("--sbatch", metavar="WORDS", help="submit each trial: options of sbatch for launch/slurm.sbatch")
    where.add_argument(
        "--resubmit", action="store_true", help="with --sbatch: again what left the queue without a result"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from adalora_scale.sweep.command import run

    return run(arguments)
