"""What a checkpoint costs training: written while all waits, and written while training goes on (training.async_save).

    python benchmarks/async_checkpoint.py                      # 100 M trainable parameters, 5 GB, 10 minutes on 2 cores
    python benchmarks/async_checkpoint.py --layers 2 --r 16 --rounds 2       # a trial of seconds

A round is one checkpoint of each kind of the same run, in turns first and second, so that a machine or a disk whose
speed drifts treats them alike. What an asynchronous one costs is the time until training goes on plus what the next
step takes beyond the undisturbed steps of its round; it is paired with the synchronous write of its round. Printed are
the means over rounds and the mean ratio, each with its 95 % interval (Student's t).
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t as student
from transformers import LlamaConfig, LlamaForCausalLM

from adalora_scale import AdaLoraConfig, RankAllocator, inject_adalora
from adalora_scale.checkpoint.background import BackgroundWriter
from adalora_scale.checkpoint.draft import Draft
from adalora_scale.checkpoint.rng import rng_state
from adalora_scale.checkpoint.state import Gathered, allocator_position, gather
from adalora_scale.checkpoint.writing import write_checkpoint
from adalora_scale.files import write_json
from adalora_scale.training.records import hardware, versions

BOUND = 0.10
"""Issue 13: what the step after an asynchronous save may cost, as a share of a synchronous write."""

State = tuple[Gathered, dict[str, Any], dict[str, Any], dict[str, str]]
"""What `write_checkpoint` takes: pieces, tensors beside them, entries of the manifest, texts."""


def main() -> int:
    """Measure and print; the exit code is 1 where the mean ratio is above `BOUND`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--r", type=int, default=908, help="rank; the default gives 100 M trainable parameters")
    parser.add_argument("--tokens", type=int, default=64, help="tokens a step")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=3, help="undisturbed steps a round")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="write the figures as JSON")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        figures = measure(arguments, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{figures['trainable_parameters'] / 1e6:.1f} M trainable parameters, {figures['bytes'] / 1e9:.2f} GB a file")
    for name, figure in figures["means"].items():
        print(f"{name:34} {figure['mean']:8.3f}  ({figure['low']:.3f} to {figure['high']:.3f})")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.output, figures)
    return int(figures["means"]["ratio"]["mean"] > BOUND)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train and write checkpoints of both kinds, in turns."""
    step, state, trainable = _run(arguments)
    writer = BackgroundWriter("benchmark")
    number = 0

    def stopped() -> dict[str, float]:
        return {"synchronous write s": _timed(lambda: write_checkpoint(folder, number, *state()), arguments.device)}

    def going(undisturbed: float) -> dict[str, float]:
        def begin() -> None:
            gathered, extras, content, texts = state()
            writer.start(Draft.of(folder, number, gathered, content, texts), gathered.groups, extras)

        begun = time.perf_counter()
        copied = _timed(begin, arguments.device)
        first = _timed(step, arguments.device)
        slowed, steps = first - undisturbed, 1
        while not writer.done:
            slowed, steps = slowed + _timed(step, arguments.device) - undisturbed, steps + 1
        writer.settle()
        return {
            "copy to host memory s": copied,
            "step after, beyond undisturbed s": first - undisturbed,
            "stall s": copied + first - undisturbed,
            "all steps while it is written s": slowed,
            "until complete s": time.perf_counter() - begun,
            "steps meanwhile": steps,
        }

    for _ in range(2):
        step()  # optimizer state and buffers
    rounds: list[dict[str, float]] = []
    size = 0
    for turn in range(arguments.rounds + 1):
        undisturbed = statistics.median(_timed(step, arguments.device) for _ in range(arguments.steps))
        found = {"undisturbed step s": undisturbed}
        for kind in (stopped, going) if turn % 2 else (going, stopped):
            number += 1
            found |= kind() if kind is stopped else going(undisturbed)
            written = folder / f"checkpoint-{number}"
            size = sum(path.stat().st_size for path in written.iterdir())
            shutil.rmtree(written)
        found["ratio"] = found["stall s"] / found["synchronous write s"]
        found["ratio of the step alone"] = found["step after, beyond undisturbed s"] / found["synchronous write s"]
        rounds.append(found)
        print(json.dumps({key: round(value, 3) for key, value in found.items()}), flush=True)
    first, rest = rounds[0], rounds[1:]  # the first checkpoint of a run makes its buffers
    return {
        "shape": {key: value for key, value in vars(arguments).items() if key not in ("output", "folder")},
        "trainable_parameters": trainable,
        "bytes": size,
        "first_round": first,
        "rounds": rest,
        "means": {name: _interval([one[name] for one in rest]) for name in first},
        "torch_threads": torch.get_num_threads(),
        "versions": versions(),
        "hardware": hardware(),
    }


def _run(arguments: argparse.Namespace) -> tuple[Callable[[], None], Callable[[], State], int]:
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=arguments.hidden, intermediate_size=arguments.hidden * 7 // 2, num_hidden_layers=arguments.layers,
        num_attention_heads=max(arguments.hidden // 64, 1), vocab_size=2048,
    )  # fmt: skip
    with torch.device(arguments.device):
        base: Any = LlamaForCausalLM._from_config(shape, dtype=torch.float32)
    config = AdaLoraConfig(
        target_modules="all-linear", init_r=arguments.r, target_r=arguments.r // 2, tinit=0, tfinal=0, deltaT=1000
    )
    model: Any = inject_adalora(base.requires_grad_(False), config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, foreach=True)
    allocator = RankAllocator(model, config, total_step=1_000_000).attach(optimizer)
    ids = torch.randint(0, 2048, (1, arguments.tokens), device=arguments.device)

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def state() -> State:
        gathered = gather(model, allocator.sharding, allocator)
        return gathered, rng_state(), {"allocator": allocator_position(allocator)}, {}

    return step, state, sum(parameter.numel() for parameter in trained)


def _timed(action: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    action()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def _interval(values: list[float]) -> dict[str, float]:
    mean = statistics.mean(values)
    half = 0.0
    if len(values) > 1:
        half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return {"mean": mean, "low": mean - half, "high": mean + half}


if __name__ == "__main__":
    raise SystemExit(main())
