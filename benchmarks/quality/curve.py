"""One run at every size: its adapter cut as `export --prune-to` cuts it, beside LoRA trained at those sizes.

Of every kept update the singular triplets of the largest singular values stay, over all matrices together, and nothing
is trained after. What training at a smaller size would have given stands in LoRA's own rows.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import Update
from adalora_scale.export.pruning import cut_by_singular_values
from benchmarks.quality.cell import Results, evaluate, train_cell
from benchmarks.quality.method import Method
from benchmarks.quality.search import best_trial, final_cells
from benchmarks.quality.tasks import QualityTask, Sources, json_lines

METHOD = "default"
SHARES = tuple(tenth / 10 for tenth in range(10, 0, -1))
_FILE = "curve.jsonl"


def run_curve(
    task: QualityTask, method: Method, target_r: int, seed: int, results: Path, sources: Sources, work: Path
) -> list[dict[str, Any]]:
    """Train the chosen setting on a seed, evaluate its adapter at ten sizes, append and return a row for each.

    Raises:
        UserError: the setting was not chosen yet.
    """
    best = best_trial(task, method.name, target_r, Results(results).of(task.name))
    if best is None:
        raise UserError(f"{task.name}: run {method.name} at budget {target_r} first; its setting is not chosen.")
    trained = train_cell(replace(best, seed=seed), task, method, sources, work)
    layers: dict[str, Any] = dict(adapter_layers(trained.trainer.model))  # type: ignore[arg-type]
    updates = {
        name: Update(
            layer.lora_A.detach().T.clone(), layer.lora_E.detach() * layer.scaling, layer.lora_B.detach().clone()
        )
        for name, layer in layers.items()
    }
    costs = {name: layer.in_features + layer.out_features for name, layer in layers.items()}
    whole = sum(int((update.e != 0).sum()) * costs[name] for name, update in updates.items())
    rows = []
    for share in SHARES:
        cuts = cut_by_singular_values(updates, costs, int(share * whole))
        with torch.no_grad():
            for name, cut in cuts.items():
                layer, rank = layers[name], len(cut.update.e)
                layer.lora_E.zero_()
                layer.lora_A[:, :rank] = cut.update.a.T
                layer.lora_B[:, :rank] = cut.update.b
                layer.lora_E[:rank] = cut.update.e / layer.scaling
        row = {
            "task": task.name,
            "target_r": target_r,
            "seed": seed,
            "share": share,
            "parameters": sum(len(cut.update.e) * costs[name] for name, cut in cuts.items()),
            "one_rank": sum(costs.values()),
            "loss": evaluate(trained.trainer)["loss"],
        }
        rows.append(row)
    with (results / _FILE).open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def curve_rows(results: Path) -> list[dict[str, Any]]:
    """Return what has been run."""
    path = results / _FILE
    return json_lines(path) if path.exists() else []


def curve_markdown(tasks: Sequence[QualityTask], results: Path) -> str:
    """Return a table a task: loss by size, of the cut adapter and of LoRA trained at a size."""
    lines: list[str] = []
    by_place: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in curve_rows(results):
        by_place[row["task"], row["target_r"]].append(row)
    for task in tasks:
        known = Results(results).of(task.name)
        for (_, target_r), rows in sorted(item for item in by_place.items() if item[0][0] == task.name):
            seeds = len({row["seed"] for row in rows})
            lines += ["", f"### {task.name}: one run at r = {target_r}, cut afterwards ({seeds} seeds)", ""]
            lines += ["| parameters, as ranks of LoRA | loss |", "|---|---|"]
            for share in SHARES:
                own = [row for row in rows if row["share"] == share]
                size = statistics.fmean(row["parameters"] / row["one_rank"] for row in own)
                lines.append(f"| {size:.2f} ({share:.0%}) | {statistics.fmean(row['loss'] for row in own):.3f} |")
            for r in sorted({cell.target_r for cell in known if cell.method == "lora" and cell.final}):
                losses = [
                    known[cell]["validation"]["loss"]
                    for cell in final_cells(task, "lora", r, seeds, known)
                    if cell in known
                ]
                if losses:
                    lines.append(f"| LoRA trained at {r} | {statistics.fmean(losses):.3f} |")
    return "\n".join(lines).strip() + "\n" if lines else ""
