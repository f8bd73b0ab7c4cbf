"""What an adapter or a checkpoint holds: ranks by layer and type, parameters, the place in the schedule, the base."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from adalora_scale.adalora.matrices import matrix_names, rows_of
from adalora_scale.checkpoint.format import MANIFEST_NAME, Checkpoint, checkpoints
from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import CONFIG_NAME, AdapterFile
from adalora_scale.export.adapter_record import BEFORE_FINAL, UNFINISHED
from adalora_scale.export.from_checkpoint import adalora_options, masks
from adalora_scale.messages import printable
from adalora_scale.reading.folders import own_file
from adalora_scale.reading.json_text import read_object
from adalora_scale.report.grid import place_of

_SPREAD = ("experts", "min", "median", "max")
_NO_LAYER = "–"


def inspect_folder(directory: Path) -> dict[str, Any]:
    """Return what `adalora-scale inspect --json` prints.

    Raises:
        UserError: the folder holds nothing that can be read, or is damaged.
        Unsupported: it holds an adapter of another method.
    """
    if not directory.is_dir():
        raise UserError(f"{directory} is not a folder; pass an adapter's or a checkpoint's.")
    if (directory / CONFIG_NAME).is_file():
        return inspect_adapter(AdapterFile(directory))
    if (directory / MANIFEST_NAME).is_file():
        return inspect_checkpoint(Checkpoint(directory))
    inside = ", ".join(path.name for path in checkpoints(directory)[:3])
    hint = f" (it holds {inside})" if inside else ""
    raise UserError(f"{directory} holds no {CONFIG_NAME}; pass an adapter's or a checkpoint's folder{hint}.")


def inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Describe a checkpoint-N folder after comparing all its checksums.

    Raises:
        UserError: it is damaged; the message names the file.
    """
    checkpoint.verify()
    manifest, options = checkpoint.manifest, adalora_options(checkpoint)
    position = manifest["allocator"]
    ranks, sides = {}, {}
    shapes, others = checkpoint.shapes("adapter"), checkpoint.shapes("other")
    for module, mask in masks(checkpoint).items():
        matrices = max(len(mask) // options.init_r, 1)
        for name, row in zip(matrix_names(module, matrices), rows_of(mask, matrices), strict=True):
            ranks[name] = sum(row)
            # Adapters that were built at their pruned ranks are not there where no triplet is left.
            if ranks[name]:
                sides[name] = (shapes[f"{module}.lora_A"][0] + shapes[f"{module}.lora_B"][0]) // matrices + 1
    total = position["total_step"]
    # As the adapter saved from it says it: in PEFT's form, where lora_alpha / init_r is the scale.
    method = options.peft_fields(total)
    return {
        "kind": "checkpoint",
        "directory": str(checkpoint.directory),
        "base": manifest.get("base_model"),
        "task_type": manifest["identity"].get("task"),
        "final": position["frozen"],
        "unfinished": None if position["frozen"] else BEFORE_FINAL,
        "ranks": ranks,
        "experts": experts_summary(ranks),
        "triplets": sum(ranks.values()),
        "parameters": sum(ranks[name] * side for name, side in sides.items()),
        "stored_parameters": sum(prod(shape) for shape in shapes.values()),
        "trained_in_full": {name: list(shape) for name, shape in others.items()},
        "trained_in_full_parameters": sum(prod(shape) for shape in others.values()),
        "lora_alpha": method["lora_alpha"],
        "init_r": method["init_r"],
        "target_r": method["target_r"],
        "budget": position["budget"],
        "budget_unit": position.get("budget_unit", "triplets"),
        "schedule": {
            "total_step": total,
            **{key: method[key] for key in ("tinit", "tfinal", "deltaT")},
            "final_allocation": total - method["tfinal"],
            "step": position["step"],
        },
        "engine": manifest.get("engine"),
        "world_size": checkpoint.world_size,
        "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
    }


def inspect_adapter(adapter: AdapterFile) -> dict[str, Any]:
    """Describe an adapter in PEFT's format."""
    config = adapter.config
    ranks = {name: shape.rank for name, shape in adapter.modules.items()}
    lambdas = sum(ranks.values()) if adapter.method == "ADALORA" else 0
    if not adapter.final:  # every triplet is stored; those of the current mask have a λ
        live = {name: int((adapter.triplets(name).e != 0).sum()) for name in ranks}
        ranks = live if any(live.values()) else ranks
    found = {
        "kind": "AdaLoRA adapter" if adapter.method == "ADALORA" else "plain LoRA adapter",
        "directory": str(adapter.directory),
        "base": adapter.base,
        "base_digests": adapter.record.get("base"),
        "base_quantisation": adapter.record.get("quantisation"),
        "task_type": adapter.task_type,
        "final": adapter.final,
        "unfinished": adapter.unfinished,
        "ranks": ranks,
        "experts": experts_summary(ranks),
        "triplets": sum(ranks.values()),
        "parameters": sum(shape.parameters for shape in adapter.modules.values()) + lambdas,
        "trained_in_full": {name: list(shape) for name, shape in adapter.others.items()},
        "trained_in_full_parameters": sum(prod(shape) for shape in adapter.others.values()),
        "labels": adapter.record.get("labels"),
        "lora_alpha": config["lora_alpha"],
    }
    if adapter.method == "ADALORA":
        found |= {"init_r": config["init_r"], "target_r": config.get("target_r"), "schedule": _schedule(adapter)}
    return found


def describe(found: dict[str, Any]) -> str:
    """Return what a person reads, without colour."""
    return "\n".join([*described(found), "", rank_table(found["ranks"])])


def described(found: dict[str, Any]) -> list[str]:
    """Return the lines that a person reads above the ranks, printable."""
    ranks: dict[str, int] = found["ranks"]
    base = found["base"] or "not named"
    if quantisation := found.get("base_quantisation"):
        base += f" ({quantisation.get('quant_type')} in training)"
    lines = [
        f"{found['kind']} in {found['directory']}",
        f"  base        {base}",
        f"  task        {found['task_type'] or 'not named'}"
        + (f", {len(found['labels'])} classes" if found.get("labels") else ""),
    ]
    if "init_r" in found:
        lines.append(
            f"  budget      init_r {found['init_r']}, target_r {found['target_r']}, alpha {found['lora_alpha']}"
        )
        lines.append(f"  schedule    {_said(found['schedule'], found['final'])}")
    if (state := found["unfinished"]) is not None:
        lines.append(f"  unfinished  {UNFINISHED[state]}")
    if "world_size" in found:
        lines.append(f"  written by  {found['engine']} on {found['world_size']} ranks, {found['bytes']:,} bytes")
    spread = f"ranks {min(ranks.values())} to {max(ranks.values())}, {list(ranks.values()).count(0)} of rank 0"
    lines.append(f"  triplets    {found['triplets']:,} over {len(ranks)} matrices ({spread})")
    extra = found["trained_in_full_parameters"]
    also = f", and {extra:,} in {len(found['trained_in_full'])} tensors trained in full" if extra else ""
    lines.append(f"  parameters  {found['parameters']:,}{also}")
    return [*map(printable, lines)]


def rank_table(ranks: dict[str, int]) -> str:
    """Return ranks as a table, a row a layer, a column a type, with sums.

    Layers of one index in different stacks (an encoder's and a decoder's) stand in tables of their own. Experts of one
    layer and projection share a cell, which has their sum; a table below says how it is spread over them.
    """
    stacks: dict[str, dict[str, dict[str, int]]] = {}
    for name, rank in ranks.items():
        place = place_of(printable(name))
        index = _NO_LAYER if place.layer is None else str(place.layer)
        row = stacks.setdefault(place.stack, {}).setdefault(index, {})
        row[place.type] = row.get(place.type, 0) + rank
    tables = [_stack_table(before, rows) for before, rows in stacks.items()]
    if summary := experts_summary(ranks):
        head = ["experts of", "number", "min", "median", "max", "at 0"]
        rows = [
            [printable(layer), *(f"{own[key]:g}" for key in _SPREAD), f"{own['share_at_0']:.0%}"]
            for layer, own in summary.items()
        ]
        tables.append("\n".join(["ranks of experts", *aligned([head, *rows])]))
    return "\n\n".join(tables)


def experts_summary(ranks: Mapping[str, int]) -> dict[str, dict[str, Any]]:
    """Return layer's projection → how many experts it has, the lowest, median and highest rank, the share at rank 0.

    Args:
        ranks: matrix → rank; matrices that are no experts' are left out.
    """
    found: dict[str, list[int]] = {}
    for name, rank in ranks.items():
        place = place_of(name)
        if "*" in place.type.split("."):
            found.setdefault(f"{place.stack}.{place.layer}.{place.type}", []).append(rank)
    return {
        layer: {
            "experts": len(own), "min": min(own), "median": median(own), "max": max(own),
            "share_at_0": own.count(0) / len(own),
        }
        for layer, own in found.items()
        if len(own) > 1
    }  # fmt: skip


def aligned(table: list[list[str]]) -> list[str]:
    """Return a table's rows as lines, its columns flush right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]


def _stack_table(before: str, rows: dict[str, dict[str, int]]) -> str:
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    leaves = [kind.rpartition(".")[2] for kind in kinds]
    heads = leaves if len(set(leaves)) == len(leaves) else kinds
    # Stacks can be a hundred layers deep, so it is the sums that catch the eye: last column, last row.
    table = [["layer", *heads, "sum"]]
    for index, row in rows.items():
        table.append([index, *(str(row.get(kind, "")) for kind in kinds), str(sum(row.values()))])
    sums = [sum(row.get(kind, 0) for row in rows.values()) for kind in kinds]
    table.append(["sum", *map(str, sums), str(sum(sums))])
    return "\n".join([f"ranks in {before}" if before else "ranks", *aligned(table)])


def _schedule(adapter: AdapterFile) -> dict[str, Any]:
    """Return total_step, the last allocation's step, and the step the files beside the adapter tell, if any."""
    config = adapter.config
    total = config.get("total_step")
    known = isinstance(total, int) and total > 1
    return {
        "total_step": total if known else None,
        "tinit": config.get("tinit"),
        "tfinal": config.get("tfinal"),
        "deltaT": config.get("deltaT"),
        "final_allocation": total - config.get("tfinal", 0) if known else None,
        "step": _step_beside(adapter.directory),
    }


def _step_beside(directory: Path) -> int | None:
    """Read the step off what a run writes beside an adapter: a checkpoint's trainer state, or a finished run's."""
    for name, key in (("trainer_state.json", "global_step"), ("run.json", "total_step")):
        try:
            step = read_object(own_file(directory / name, directory), finite=False).get(key)
        except UserError:  # there is none, or it is no file of a run
            continue
        if type(step) is int:
            return step
    return None


def _said(schedule: dict[str, Any], final: bool) -> str:
    total, allocation, step = (schedule[key] for key in ("total_step", "final_allocation", "step"))
    if total is None:
        return "final" if final else "not recorded"
    place = f"step {step} of {total}" if step is not None else f"a run of {total} steps"
    if final:
        return f"{place}; final, allocated at step {allocation}"
    return f"{place}; not final, the last allocation comes at step {allocation}"
