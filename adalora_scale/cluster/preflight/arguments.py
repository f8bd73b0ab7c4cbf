"""The command line of `adalora-scale preflight`; light, so that --help answers at once."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

_STARTS = """
every host of the job, one process for each GPU, as the run itself would be started:
  torchrun --nnodes 2 --nproc-per-node 8 … -m adalora_scale preflight --config FILE
  deepspeed --hostfile FILE --no_local_rank --module adalora_scale preflight --config FILE
  srun --ntasks-per-node 8 python -m adalora_scale preflight --config FILE
Exit code: 0 healthy, 1 a check failed, 2 wrong use. NCCL is used where every rank has a GPU, else gloo on the CPU.
"""


def add_parser(verbs: Any) -> None:
    """Register the verb."""
    parser = verbs.add_parser(
        "preflight",
        help="is this cluster healthy? versions, GPUs, links, disks, limits",
        description="Check the hosts of a job before the job: versions, GPUs, every link, disks, limits.",
        epilog=_STARTS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="a run's YAML file: takes the model's path and output_dir")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values that replace the file's")
    parser.add_argument("--model-path", type=Path, metavar="DIR", help="folder with the weights, to time reading")
    parser.add_argument("--output-dir", type=Path, metavar="DIR", help="the run's folder, which all ranks must share")
    parser.add_argument("--thresholds", type=Path, metavar="FILE", help="YAML file whose limits replace the shipped")
    parser.add_argument("--time-limit", type=float, default=120, metavar="S", help="for measuring links (default 120)")
    parser.add_argument("--timeout", type=float, default=120, metavar="S", help="for one answer (default 120)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    from adalora_scale.cluster.preflight.command import run

    return run(arguments)
