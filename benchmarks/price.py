"""What a training step costs beside LoRA's: time, operations, memory, and what ranks send one another.

    python benchmarks/price.py                                  # few large matrices, 560 tiny ones; minutes on 2 cores
    python benchmarks/price.py --shapes tiny560 --bases 16bit   # one of the tables
    python benchmarks/price.py --shapes 8b --bases 4bit --device cuda --ranks 0
    python benchmarks/price.py --shapes seconds --rounds 4      # try the command out
    python benchmarks/price.py --show FILE                      # an earlier --output as Markdown; measures nothing

All methods adapt the same matrices of one random Llama. Before pruning all have the initial rank; after it
ours and PEFT's AdaLoRA have half of the budget left, and LoRA is shown at both ranks. The base alone, forward and
backward, is the floor under all of them. AdamW is torch's fused one, which transformers takes by default. Steps are
interleaved, a round takes one of each in an order drawn anew, and a ratio is the median over rounds of the paired
ratios with its 95 % bootstrap interval. Operations, reads of single values and bytes are counted, and are the same in
every run. Peak memory is that of live tensors over the frozen base: adapters, gradients, optimizer, statistics and
activations.
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, not as a module

from adalora_scale.errors import UserError, run_reporting_errors
from adalora_scale.files import write_json
from benchmarks.pricing.printing import page, print_sent, print_table
from benchmarks.pricing.shapes import SHAPES


def main() -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shapes", nargs="+", choices=SHAPES, default=["wide", "tiny560"], help="default: wide tiny560"
    )
    parser.add_argument(
        "--bases", nargs="+", choices=["16bit", "4bit"], default=["16bit", "4bit"], help="default: both"
    )
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each method (default 30)")
    parser.add_argument("--device", help="default: cuda where torch sees a GPU, cpu elsewhere")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: bfloat16 on cuda, float32 on CPU")
    parser.add_argument("--ranks", type=int, default=2, help="CPU ranks that collectives are counted on (0: none)")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print what --output wrote, as Markdown, and end")
    arguments = parser.parse_args()
    return run_reporting_errors(lambda: _price(arguments))


def _price(arguments: argparse.Namespace) -> int:
    if arguments.show:
        print(_page_of(arguments.show))
        return 0
    if arguments.rounds < 2:
        raise UserError(f"--rounds is {arguments.rounds}; an interval needs at least 2.")
    return _measure(arguments)


def _measure(arguments: argparse.Namespace) -> int:
    # Seconds of imports, which --help and --show do without.
    import torch

    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # recommends an optional CPU kernel when PEFT imports it
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)

    from adalora_scale.training.records import hardware, versions
    from benchmarks.pricing.measuring import table
    from benchmarks.pricing.ranks import start_ranks

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch sees no GPU.")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if device == "cuda" else "float32"))
    tables = []
    for name in arguments.shapes:
        for base in arguments.bases:
            tables.append(table(name, base, dtype, device, arguments.rounds))
            print_table(tables[-1])
    sent = start_ranks(arguments.ranks) if arguments.ranks else {}
    print_sent(sent, arguments.ranks)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        figures = {"tables": tables, "collectives": sent, "ranks": arguments.ranks, "dtype": str(dtype)}
        figures |= {"commit": _commit(), "torch_threads": torch.get_num_threads(), "hardware": hardware()}
        write_json(arguments.output, figures | {"versions": versions() | {"peft": version("peft")}})
    return 0


def _page_of(file: Path) -> str:
    try:
        return page(json.loads(file.read_text("utf-8")))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"--show: {file} is not what --output writes ({type(error).__name__}: {error}).") from error


def _commit() -> str:
    """Return what is measured, `-dirty` where files differ from it; "unknown" outside a checkout."""
    describe = ["git", "describe", "--always", "--exclude=*", "--dirty", "--abbrev=12"]
    folder = Path(__file__).parent
    try:
        return subprocess.run(describe, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main())
