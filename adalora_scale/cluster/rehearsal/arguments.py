"""The command line of `adalora-scale rehearse`; light, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
from typing import Any

from adalora_scale.config.command_line import add_config_arguments

_EXAMPLES = """
examples:
  adalora-scale rehearse --config configs/recipes/llama3_70b_qadalora.yaml --gpus 1024
  adalora-scale rehearse --config configs/recipes/llama3_70b_qadalora.yaml --gpus 1024 --nodes 128
  adalora-scale rehearse --config FILE --gpus 64 --json adalora.init_r=64 adalora.preset=paper
What runs is the code of a real run (attach, one optimizer step's hooks, an allocation, the final one, a checkpoint's
layout, a resume on other numbers of ranks), as the first, a middle and the last rank, in a process group whose other
ranks are not there and over weights that have shapes and no values. The forward, the backward and the optimizer's own
arithmetic are not run: `adalora-scale plan` tells their memory and traffic. No GPU, no weights, no network.
docs/scale.md explains every figure. Exit code 0: rehearsed, 2: wrong use.
"""


def add_parser(verbs: Any) -> None:
    """Register the verb."""
    parser = verbs.add_parser(
        "rehearse",
        help="attach, step, allocate, save and resume as one rank of thousands; what grows with ranks or layers",
        description="Rehearse a run at a scale that is not at hand, and count what it asks for.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the job, one rank each")
    parser.add_argument(
        "--nodes", type=int, default=1, metavar="M", help="FSDP2: hosts with a copy each (HSDP; default 1: one copy)"
    )
    parser.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed's configuration, as launch/train.py takes it")
    parser.add_argument("--rank", type=int, metavar="K", help="be this rank alone (default: first, middle and last)")
    parser.add_argument("--no-growth", action="store_true", help="do not run it again with half the ranks and layers")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every figure")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import logging
    import warnings

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from adalora_scale.cluster.rehearsal.command import run

    return run(arguments)
