"""The command line of `adalora-scale plan`; light, so that --help answers at once."""

from __future__ import annotations

import argparse
import os
from typing import Any

from adalora_scale.config.command_line import add_config_arguments

_EXAMPLES = """
examples:
  adalora-scale plan --config configs/recipes/llama3_70b_qadalora.yaml --gpus 16 --nodes 2
  adalora-scale plan --config FILE --gpus 2 --gpu-memory 24GB engine.config.cpu_offload=true
No GPU, no weights and no network are needed: a config.json (or a shipped shape) is enough. Exit code 0: it fits, 1: it
does not, 2: wrong use.
"""


def add_parser(verbs: Any) -> None:
    """Register the verb."""
    parser = verbs.add_parser(
        "plan",
        help="does a run fit, and how fast will it be? before GPUs are rented",
        description="Plan memory, traffic and time of a run, for every engine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--gpus", type=int, required=True, metavar="N", help="GPUs of the job, one rank each")
    parser.add_argument("--nodes", type=int, default=1, metavar="M", help="hosts they are spread over (default 1)")
    parser.add_argument("--gpu", metavar="NAME", help="h100 (assumed) h200 a100 a100-40gb l40s rtx4090; tells times")
    parser.add_argument("--gpu-memory", metavar="80GB", help="memory of a GPU, instead of the named one's")
    parser.add_argument("--deepspeed", metavar="FILE", help="DeepSpeed's configuration, as launch/train.py takes it")
    parser.add_argument("--micro-batch", type=int, metavar="B", help="sequences a GPU handles at a time")
    parser.add_argument("--global-batch", type=int, metavar="B", help="sequences an optimizer step, over all GPUs")
    parser.add_argument("--whole-logits", action="store_true", help="the loss builds all logits (not TRL's tiles)")
    figures = parser.add_argument_group("figures of the hardware")
    figures.add_argument("--peak-tflops", type=float, metavar="T", help="dense bf16 throughput of a GPU")
    figures.add_argument("--efficiency", type=float, default=0.5, metavar="E", help="share of it reached (default 0.5)")
    figures.add_argument("--memory-bandwidth", type=float, metavar="GB/s", help="of a GPU's memory")
    figures.add_argument("--link-bandwidth", type=float, metavar="GB/s", help="one GPU to others of its node")
    figures.add_argument("--node-bandwidth", type=float, metavar="GB/s", help="one GPU to other nodes (default 45)")
    figures.add_argument("--disk-bandwidth", type=float, metavar="GB/s", help="reading, a node (default 2)")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every part")
    parser.set_defaults(run=_run)


def _run(arguments: argparse.Namespace) -> int:
    import logging
    import warnings

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    from adalora_scale.cluster.plan.command import run

    return run(arguments)
