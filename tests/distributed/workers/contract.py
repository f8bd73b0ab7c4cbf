"""Cells of the contract suite on real ranks: each equals one process or is refused by name.

run_ranks(…, args=[ENGINE, CELL or CELL+MUTANT…])    reports CELL → {"verdict", "reason", …} after each cell
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import os
import sys
import tempfile
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from adalora_scale import RankAllocator, save_adapter
from adalora_scale.controller.guard import RanksDisagree
from adalora_scale.engines import trained_parameters
from adalora_scale.errors import Unsupported, UserError
from tests.distributed.contract_cells import CELLS, Cell
from tests.distributed.launcher import report
from tests.distributed.workers.contract_engines import (
    CONFIG,
    STEPS,
    batches,
    build,
    runner_of,
    values_in_forward,
)
from tests.distributed.workers.contract_mutants import mutant_of

HANG_S = 60
PREFIX = "base_model.model."
TOLERANCES = {
    # ‖w − w_ref‖ / ‖w_ref‖ over all trained tensors together. Two orders of addition differ by 1e-7.
    "exact": 1e-5,
    # Gradients were rounded once to 8 bits (2⁻⁹ each, signs at random); 5e-4 was seen.
    "rounded-gradients": 2e-3,
    # Weights, activations and gradients have 8 bits; 3e-3 to 1e-2 was seen. A λ that should be zero makes 1e-1.
    "bf16": 3e-2,
}


@dataclass
class Result:
    """What a run leaves behind on this rank."""

    masks: dict[int, list[bool]] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    """What the forward computes with at the end."""
    moments: dict[str, Tensor] = field(default_factory=dict)
    """Adam's first moment, whole."""


class Wrong(Exception):
    """A cell is neither right nor refused."""


def train(
    runner: Any, allocator: RankAllocator, rank: int, ranks: int, after_step: Any = None
) -> dict[int, list[bool]]:
    masks = {}
    for step, ids in enumerate(batches(), 1):
        runner.train(ids.chunk(ranks)[rank])
        if allocator.step != step:
            raise Wrong(f"the allocator counts {allocator.step} steps after {step}")
        if allocator.last_allocation is not None and allocator.last_allocation.step == step:
            masks[step] = allocator.mask.tolist()
        if after_step is not None:
            after_step(step)
    return masks


def one_process() -> Result:
    model = build()
    runner = runner_of("single", Cell(), model)
    allocator = RankAllocator(model, CONFIG, total_step=STEPS).attach(runner.target)
    result = Result(train(runner, allocator, 0, 1))
    result.weights = values_in_forward(runner, model, batches()[0])
    result.moments = {n: runner.optimizer.state[p]["exp_avg"] for n, p in trained_parameters(model).items()}
    return result


def run_cell(engine: str, cell: Cell, mutant: str, expected: Result, folder: Path) -> dict[str, Any]:
    """Run one cell and return its figures.

    Raises:
        Wrong: it is not right.
        UserError, Unsupported: it was refused.
    """
    rank, ranks = dist.get_rank(), dist.get_world_size()
    with contextlib.closing(started(engine, cell)) as unattached:
        for ids in batches()[:2]:
            unattached.train(ids.chunk(ranks)[rank])
        save_adapter(unattached.plain, folder / "unattached")
        seen = values_in_forward(unattached, unattached.plain, batches()[0].chunk(ranks)[rank])
        check_saved(folder / "unattached", seen, None, "without an allocator")
    with mutant_of(mutant) as after_step, contextlib.closing(started(engine, cell)) as runner:
        allocator = RankAllocator(runner.model, CONFIG, total_step=STEPS).attach(runner.target)
        masks = train(runner, allocator, rank, ranks, after_step and (lambda step: after_step(step, allocator)))
        model = runner.plain
        save_adapter(model, folder / "trained")
        seen = values_in_forward(runner, model, batches()[0].chunk(ranks)[rank])
        save_adapter(model, folder / "evaluated")
        allocator.check_consistency()
        pieces = whole_pieces(allocator)
        figures = check_run(cell, expected, masks, seen, allocator, pieces)
        for kind in ("trained", "evaluated"):
            check_saved(folder / kind, seen, allocator.mask, f"the adapter saved when {kind}")
        first, second = (load_file(folder / kind / "adapter_model.safetensors") for kind in ("trained", "evaluated"))
        if changed := [key for key in first if not same_bits(first[key], second[key])]:
            raise Wrong(f"an evaluation changes what is saved: {changed[0]} {second[changed[0]].dtype}")
        return figures


def started(engine: str, cell: Cell) -> Any:
    model = build()
    runner = runner_of(engine, cell, model)
    runner.plain = model
    return runner


def check_run(
    cell: Cell,
    expected: Result,
    masks: dict[int, list[bool]],
    seen: dict[str, Tensor],
    allocator: RankAllocator,
    pieces: tuple[dict[str, Tensor], dict[str, Tensor]],
) -> dict[str, Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, masks)
    if any(other != everyone[0] for other in everyone):
        raise Wrong("ranks have different masks")
    counts = {step: sum(mask) for step, mask in masks.items()}
    if counts != {step: allocator.schedule.budget(step) for step in expected.masks}:
        raise Wrong(f"triplets kept at the allocations: {counts}")
    alive = 0
    for name, row in allocator.rank_pattern().items():
        dead = seen[name][~torch.tensor(row)]
        alive += int((seen[name] != 0).sum())
        if bool((dead != 0).any()):
            raise Wrong(f"λ outside the mask is alive in the forward: {name} {dead.tolist()}")
    exact = cell.precision == "exact"
    if exact and masks != expected.masks:
        raise Wrong(f"masks differ from one process's at {[s for s in masks if masks[s] != expected.masks[s]]}")
    together, worst, name = distances(seen, expected.weights)
    if not together <= TOLERANCES[cell.precision]:
        raise Wrong(f"weights of the forward are {together:.1e} from one process's, worst {name} {worst:.1e}")
    weights, moments = pieces
    for key, value in weights.items():
        if not torch.equal(value.to(seen[key].dtype), seen[key]):
            raise Wrong(f"the state written to checkpoints holds another '{key}' than the forward")
    from_reference, worst_moment, moment_name = distances(moments, expected.moments)
    if exact and not from_reference <= 1e-4:
        raise Wrong(f"moments are {from_reference:.1e} from one process's, worst {moment_name} {worst_moment:.1e}")
    return {
        "distance": together,
        "worst": [name, worst],
        "moments": from_reference,
        "alive": alive,
        "masks": masks == expected.masks,
        "calls": allocator.sharding.calls_per_step,
        "split_rows": allocator._attached().reduction.split_rows,
    }


def distances(values: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, float, str]:
    """Return ‖v − r‖ / ‖r‖ over all tensors together, of the worst tensor, and its name."""
    if values.keys() != reference.keys():
        raise Wrong(f"tensors differ: {sorted(values.keys() ^ reference.keys())}")
    difference = total = 0.0
    each = {}
    for name, expected in reference.items():
        if values[name].shape != expected.shape:
            raise Wrong(f"'{name}' has shape {tuple(values[name].shape)}")
        d = (values[name].double() - expected.double()).square().sum().item()
        n = expected.double().square().sum().item()
        difference, total = difference + d, total + n
        each[name] = (d / n) ** 0.5 if n > 0 else float(d > 0)
    worst = max(each, key=lambda name: each[name])
    return (difference / total) ** 0.5, each[worst], worst


def whole_pieces(allocator: RankAllocator) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Put together, from all ranks, the weights and first moments that a checkpoint would hold."""
    pieces = allocator.sharding.pieces()
    if lost := [piece.name for piece in pieces if "exp_avg" not in piece.state]:
        raise Wrong(f"a checkpoint would hold no moments of '{lost[0]}'")
    own = [(piece.name, piece.start, piece.weight.clone(), piece.state["exp_avg"].clone()) for piece in pieces]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    shapes = {name: p.shape for name, p in trained_parameters(build()).items()}
    weights = {name: torch.full((shape.numel(),), torch.nan) for name, shape in shapes.items()}
    moments = {name: torch.full((shape.numel(),), torch.nan) for name, shape in shapes.items()}
    for name, start, weight, moment in (piece for rank in everyone for piece in rank):
        weights[name][start : start + weight.numel()] = weight
        moments[name][start : start + weight.numel()] = moment
    return tuple({n: v.view(shapes[n]) for n, v in found.items()} for found in (weights, moments))  # type: ignore[return-value]


def check_saved(folder: Path, seen: dict[str, Tensor], mask: Tensor | None, what: str) -> None:
    """Compare a saved adapter, bit by bit, with what the forward computed with."""
    dist.barrier()
    saved = {key.removeprefix(PREFIX): value for key, value in load_file(folder / "adapter_model.safetensors").items()}
    if saved.keys() != seen.keys():
        raise Wrong(f"{what} holds other tensors: {sorted(saved.keys() ^ seen.keys())}")
    modules = [name.removesuffix(".lora_E") for name in seen if name.endswith("lora_E")]
    keep = torch.ones(len(modules), CONFIG.init_r, dtype=torch.bool) if mask is None else mask.view(len(modules), -1)
    rows = dict(zip(modules, keep, strict=True))
    for name, value in seen.items():
        module, _, kind = name.rpartition(".")
        wanted = {
            "lora_A": lambda value=value, module=module: value[:, rows[module]].T,
            "lora_E": lambda value=value, module=module: value[rows[module]].unsqueeze(1),
            "lora_B": lambda value=value, module=module: value[:, rows[module]],
        }.get(kind, lambda value=value: value)()
        found = saved[name].to(wanted.dtype)
        if found.shape != wanted.shape or not torch.equal(found, wanted):
            away = float((found - wanted).norm() / wanted.norm()) if found.shape == wanted.shape else float("nan")
            raise Wrong(f"{what}: saved '{name}' is {away:.1e} from what the forward computes with")


def same_bits(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def outcome_of(engine: str, name: str, expected: Result, folder: Path) -> dict[str, Any]:
    cell_name, _, mutant = name.partition("+")
    cell = CELLS[engine][cell_name]
    try:
        return {"verdict": "equal", "reason": ""} | run_cell(engine, cell, mutant, expected, folder)
    except Wrong as error:
        return {"verdict": "wrong", "reason": str(error)}
    except (UserError, Unsupported, RanksDisagree) as error:
        return {"verdict": "refused", "reason": str(error)}
    except Exception as error:
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(last.filename).name}:{last.lineno} {last.name}"
        return {"verdict": "crashed", "reason": f"{type(error).__name__}: {error} ({where})"}


def main(engine: str, *names: str) -> None:
    if engine.startswith("zero"):
        import deepspeed

        deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(seconds=HANG_S))
    else:
        dist.init_process_group("gloo", timeout=timedelta(seconds=HANG_S))
    expected = one_process()
    store = dist.distributed_c10d._get_default_store()
    with tempfile.TemporaryDirectory() as own:
        shared: list[Any] = [own]
        dist.broadcast_object_list(shared)
        for number, name in enumerate(names):
            # What hangs ends here with every stack in the log; cells before it have reported.
            faulthandler.dump_traceback_later(HANG_S, exit=True)
            outcome = outcome_of(engine, name, expected, Path(shared[0]) / name)
            faulthandler.cancel_dump_traceback_later()
            gc.collect()
            report(**{name: outcome})
            store.set(f"{number}.{dist.get_rank()}", outcome["verdict"])
            verdicts = {store.get(f"{number}.{rank}").decode() for rank in range(dist.get_world_size())}
            if len(verdicts) > 1:  # collectives are out of step: what would follow means nothing
                raise SystemExit(f"{name}: ranks ended differently: {sorted(verdicts)}")
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
