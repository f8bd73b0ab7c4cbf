"""`adalora-scale verify-engines`: join the process group, run the matrix, print the table, write JSON."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from adalora_scale.cluster.place import launched
from adalora_scale.cluster.ranks import process_group
from adalora_scale.config import PRESETS
from adalora_scale.errors import UserError, nearest
from adalora_scale.files import replace_text
from adalora_scale.messages import say, say_text
from adalora_scale.verify import memory
from adalora_scale.verify.engines import ENGINES, VARIANTS
from adalora_scale.verify.matrix import ALL_TOLERANCE, BF16_TOLERANCE, TENSOR_TOLERANCE, Cell, run_matrix
from adalora_scale.verify.mixture import KINDS
from adalora_scale.verify.problem import Problem

QUICK_VARIANTS = ("plain", "clip")
PACKAGES = ("adalora-scale", "torch", "transformers", "deepspeed", "bitsandbytes")
_ROW = "{:<14} {:<13} {:>5}  {:>6}  {:>9}  {:>9}  {:>9}  {:<36} {:>8}  {:>9}  {:>9}  {}"
_MEMORY_ROW = "{:<14} {:>5}  {:<22} {:>14}  {:>14}  {:>8}  {:>8}  {}"


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the command line asked for."""

    engines: Sequence[str] = ENGINES
    variants: Sequence[str] = VARIANTS
    model: str | None = None
    steps: int = 60
    memory: bool = False
    experts: str | None = None
    """Which mixture of experts; None is none."""
    load_in_4bit: bool = False
    preset: str = "default"
    json_file: Path | None = None

    def __post_init__(self) -> None:
        for option, given, known in (
            ("--engines", self.engines, ENGINES),
            ("--variants", self.variants, VARIANTS),
            ("--preset", [self.preset], PRESETS),
            ("--experts", [] if self.experts is None else [self.experts], KINDS),
        ):
            for name in given:
                if name not in known:
                    raise UserError(f"{option}: '{name}' is not one of {', '.join(known)}.{nearest(name, known)}")
        if self.experts and self.model is not None:
            raise UserError("--experts makes a random mixture of experts; remove it, or remove --model.")
        if self.json_file is not None and not self.json_file.absolute().parent.is_dir():
            raise UserError(f"--json: the folder of '{self.json_file}' does not exist.")
        if self.json_file is not None and self.json_file.is_dir():
            raise UserError(f"--json: '{self.json_file}' is a folder; name a file.")

    def arguments(self) -> list[str]:
        """Return the command line that asks for the same."""
        options: dict[str, Any] = {
            "--model": self.model,
            "--steps": self.steps,
            "--preset": self.preset,
            "--experts": self.experts,
            "--json": self.json_file,
        }
        given = [str(part) for name, value in options.items() if value is not None for part in (name, value)]
        flags = ["--memory"] * self.memory + ["--load-in-4bit"] * self.load_in_4bit
        return [*flags, *given, "--engines", *self.engines, "--variants", *self.variants]


def start_ranks(count: int, request: Request) -> int:
    """Start the request on `count` ranks of this machine through torchrun and return the exit code."""
    if count < 1:
        raise UserError(f"--nproc is {count}; it must be at least 1.")
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [sys.executable, "-m", *launcher, "-m", "adalora_scale", "verify-engines", *request.arguments()]
    # Ranks share the machine's cores; without this every one of them starts as many threads as there are cores.
    threads = str(max(1, (os.cpu_count() or 1) // count))
    return subprocess.run(command, env={"OMP_NUM_THREADS": threads} | os.environ, check=False).returncode


def verify_engines(request: Request) -> int:
    """Run the cells on the ranks that a launcher started; return 1 if one failed.

    Raises:
        UserError: not started on ranks, or an engine or variant does not exist.
    """
    place = launched()
    if place is None:
        raise UserError("verify-engines runs on ranks: add --nproc N, or start it with torchrun, deepspeed or srun.")
    with process_group(place) as device:
        problem = Problem(
            model=request.model,
            device=device,
            ranks=dist.get_world_size(),
            steps=request.steps,
            experts=request.experts,
            load_in_4bit=request.load_in_4bit,
            preset=request.preset,
        )
        header = {
            "backend": dist.get_backend(),
            "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
            "ranks": problem.ranks,
            "versions": _versions(),
            "model": request.model
            or (f"random mixture of experts ({request.experts})" if request.experts else "random Llama"),
            "load_in_4bit": request.load_in_4bit,
            "preset": request.preset,
            "steps": problem.steps,
            "global_batch": problem.global_batch,
        }
        _print_header(header)
        cells = run_matrix(request.engines, request.variants, problem, on_cell=_print_cell)
        usages = _measure_memory(device, request) if request.memory else []
        failed = any(cell.verdict == "fail" for cell in cells) or any(usage.verdict == "fail" for usage in usages)
        if dist.get_rank() == 0:
            ran = sum(cell.verdict != "not run" for cell in cells)
            say(f"{ran} of {len(cells)} cells ran, {sum(cell.verdict == 'fail' for cell in cells)} failed")
            if request.json_file is not None:
                rows = {"cells": [cell.as_dict() for cell in cells], "memory": [usage.as_dict() for usage in usages]}
                replace_text(request.json_file, json.dumps(header | rows | {"passed": not failed}, indent=2) + "\n")
        return 1 if failed else 0


def _measure_memory(device: torch.device, request: Request) -> list[memory.Usage]:
    ranks = dist.get_world_size()
    problem = memory.MemoryProblem(model=None, device=device, ranks=ranks, load_in_4bit=request.load_in_4bit)
    _say("\n" + _MEMORY_ROW.format("engine", "ranks", "what", "bytes a rank", "one process", "share", "1/N", ""))
    usages = []
    for engine in memory.ENGINES:
        if engine not in request.engines:
            continue
        for usage in memory.measure(engine, problem):
            figures = (f"{usage.bytes_per_rank:,}", f"{usage.one_process:,}", f"{usage.share:.4f}")
            ideal = f"{1 / usage.ranks:.4f}"
            _say(_MEMORY_ROW.format(usage.engine, usage.ranks, usage.kind, *figures, ideal, usage.verdict))
            usages.append(usage)
    return usages


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


def _print_header(header: dict[str, Any]) -> None:
    versions = ", ".join(f"{name} {version}" for name, version in header["versions"].items())
    _say(f"{header['backend']} on {header['ranks']} ranks ({header['device']}); {versions}")
    base = f"{header['model']}{' in 4 bits' * header['load_in_4bit']}, preset {header['preset']}"
    _say(
        f"{base}, {header['steps']} steps of {header['global_batch']} sequences; pass: every mask equal to "
        f"the float64 reference's, ‖w − w_ref‖ / ‖w_ref‖ ≤ {ALL_TOLERANCE:g} together and ≤ {TENSOR_TOLERANCE:g} for "
        f"each tensor; bf16: masks equal on all ranks, eval loss within {BF16_TOLERANCE:.0%} of one bf16 process\n"
    )
    columns = ("engine", "variant", "ranks", "same", "masks =", "‖Δw‖/‖w‖", "worst", "worst tensor", "min gap")
    _say(_ROW.format(*columns, "eval loss", "reference", "verdict"))


def _print_cell(cell: Cell) -> None:
    if cell.verdict == "not run":
        _say(_ROW.format(cell.engine, cell.variant, cell.ranks, *[""] * 8, f"not run: {cell.reason}"))
        return
    equal = "" if cell.allocations_equal is None else f"{cell.allocations_equal}/{cell.allocations}"
    scientific = ["" if value is None else f"{value:.1e}" for value in (cell.distance, cell.worst, cell.min_gap)]
    tensor = (cell.worst_tensor or "").removeprefix("model.layers.")
    losses = [f"{value:.4f}" for value in (cell.eval_loss, cell.reference_loss) if value is not None]
    same = "yes" if cell.masks_equal_over_ranks else "NO"
    verdict = cell.verdict if not cell.reason else f"{cell.verdict}: {cell.reason}"
    distance, worst, gap = scientific
    _say(
        _ROW.format(cell.engine, cell.variant, cell.ranks, same, equal, distance, worst, tensor, gap, *losses, verdict)
    )


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        say_text(line)
