"""What a training step costs beside LoRA's: time, operations, memory, and what ranks send one another.

    python benchmarks/price.py                                  # few large matrices, 560 tiny ones; minutes on 2 cores
    python benchmarks/price.py --shapes tiny560 --bases 16bit   # one of the tables
    python benchmarks/price.py --shapes 8b --bases 4bit --device cuda --ranks 0
    python benchmarks/price.py --shapes seconds --rounds 4      # try the command out
    python benchmarks/price.py --show FILE                      # an earlier --output as Markdown; measures nothing

All methods adapt the same matrices of one random Llama. Before pruning all have the initial rank; after it
ours and PEFT's AdaLoRA have half of the budget left, and LoRA is shown at both ranks. AdamW is torch's fused one, which
transformers takes by default. Steps are interleaved, a round
takes one of each in an order drawn anew, and a ratio is the median over rounds of the paired ratios with its 95 %
bootstrap interval. Operations, reads of single values and bytes are counted, and are the same in every run.
Peak memory is that of live tensors over the frozen base: adapters, gradients, optimizer, statistics and activations.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # started as a file, not as a module

import numpy as np
import torch
from scipy.stats import bootstrap
from torch import nn

from adalora_scale.errors import UserError, run_reporting_errors
from adalora_scale.files import write_json
from adalora_scale.training.records import hardware, versions
from benchmarks.pricing.counting import count, kernels, peak_bytes
from benchmarks.pricing.methods import (
    EARLY,
    SHAPES,
    Method,
    Shape,
    base_model,
    ours,
    ours_resumed,
    peft_adalora,
    plain_lora,
)
from benchmarks.pricing.printing import page, print_sent, print_table
from benchmarks.pricing.ranks import start_ranks

LORA, LAYERS, OURS, PAPER, THEIRS = "LoRA (PEFT)", "ours, no allocator", "ours", "ours, paper", "AdaLoRA (PEFT)"
HALF, PRUNED, RESUMED, THEIRS_PRUNED = "LoRA (PEFT), half", "ours, pruned", "ours, resumed", "AdaLoRA (PEFT), pruned"
RATIOS = (
    (OURS, LAYERS), (PAPER, LAYERS), (OURS, LORA), (PAPER, LORA), (THEIRS, OURS), (THEIRS, PAPER), (THEIRS, LORA),
    (PRUNED, LORA), (RESUMED, LORA), (RESUMED, HALF), (THEIRS_PRUNED, LORA),
)  # fmt: skip
DELTA_T = 10
"""Steps between allocations, everywhere."""


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
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # recommends an optional CPU kernel when PEFT imports it
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
    if arguments.rounds < 2:
        raise UserError(f"--rounds is {arguments.rounds}; an interval needs at least 2.")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device=cuda, but torch sees no GPU.")
    dtype = getattr(torch, arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32"))
    tables = []
    for name in arguments.shapes:
        for base in arguments.bases:
            tables.append(table(SHAPES[name], name, base, dtype, arguments))
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


def table(shape: Shape, name: str, base: str, dtype: torch.dtype, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every method at one shape over one kind of base."""
    device = arguments.device
    mine = base_model(shape, dtype, device, base)
    theirs = mine if base == "16bit" else base_model(shape, dtype, device, "4bit-bnb")
    builders: dict[str, Callable[[], Method]] = {
        LORA: partial(plain_lora, theirs, shape, device, shape.r),
        HALF: partial(plain_lora, theirs, shape, device, shape.r // 2),
        LAYERS: partial(ours, mine, shape, device, allocator=False),
        OURS: partial(ours, mine, shape, device),
        PAPER: partial(ours, mine, shape, device, preset="paper"),
        PRUNED: partial(ours, mine, shape, device, pruned=True),
        RESUMED: partial(ours_resumed, mine, shape, device),
        THEIRS: partial(peft_adalora, theirs, shape, device, pruned=False),
        THEIRS_PRUNED: partial(peft_adalora, theirs, shape, device, pruned=True),
    }
    held = _bytes(mine) + (0 if theirs is mine else _bytes(theirs))
    figures: dict[str, dict[str, Any]] = {method: _alone(build, held, device) for method, build in builders.items()}
    methods = {method: _ready(build()) for method, build in builders.items()}
    steps, updates = _interleaved(methods, arguments.rounds)
    for method, values in figures.items():
        values["step_seconds"], values["update_seconds"] = steps[method], updates[method]
    return {
        "shape": name,
        "base": base,
        "matrices": shape.matrices,
        "tokens": shape.tokens,
        "initial_rank": shape.r,
        "methods": figures,
        "ratios": {f"{a} / {b}": _ratio(steps[a], steps[b]) for a, b in RATIOS},
        "update_ratios": {f"{a} / {b}": _ratio(updates[a], updates[b]) for a, b in RATIOS},
    }


def _ready(method: Method) -> Method:
    """Make the optimizer's state, and pass the final allocation where it comes early."""
    while method.done < EARLY:
        method.step()
    return method


def _alone(build: Callable[[], Method], held: int, device: str) -> dict[str, Any]:
    """Count in the steps up to the first allocation, with nothing else in memory but the bases' `held` bytes."""
    gc.collect()
    method = _ready(build())
    figures: dict[str, Any] = {"trained_parameters": method.parameters}
    figures["peak_bytes"] = peak_bytes(method.step, device) - held
    figures["step"] = count(method.step)
    if device == "cuda":
        figures["kernels"] = kernels(method.step)
    while method.done + 1 < DELTA_T:
        method.step()
    figures["step_with_allocation"] = count(method.step)
    return figures


def _interleaved(methods: dict[str, Method], rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    steps: dict[str, list[float]] = {name: [] for name in methods}
    updates: dict[str, list[float]] = {name: [] for name in methods}
    order, names = random.Random(0), list(methods)
    for _ in range(rounds):
        order.shuffle(names)  # nobody always finds the memory as the same other left it
        for name in names:
            whole, second = methods[name].timed()
            steps[name].append(whole)
            updates[name].append(second)
    return steps, updates


def _ratio(one: list[float], other: list[float]) -> dict[str, float]:
    pairs = np.array(one) / np.array(other)
    interval = bootstrap((pairs,), np.median, n_resamples=2000, method="percentile", rng=0).confidence_interval
    return {"median": float(np.median(pairs)), "low": float(interval.low), "high": float(interval.high)}


def _bytes(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        tensors += [value for value in vars(module).values() if isinstance(value, torch.Tensor)]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


if __name__ == "__main__":
    sys.exit(main())
