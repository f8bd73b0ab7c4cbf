"""Folders as runs leave them, made on the spot: whatever number of matrices, allocations and words."""

import json

import numpy as np
import torch

from adalora_scale.adalora.allocation import keep_best, relative_gap
from adalora_scale.report.score_lines import encode

TYPES = {
    "self_attn.q_proj": (64, 64), "self_attn.k_proj": (64, 32), "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64), "mlp.gate_proj": (64, 160), "mlp.up_proj": (64, 160), "mlp.down_proj": (160, 64),
}  # fmt: skip


def matrices(layers=4, *, experts=0, also=()):
    """{name: (in, out)} of a model; with experts in every layer, and with matrices outside the layers."""
    found = {}
    for layer in range(layers):
        for kind, sides in TYPES.items():
            if experts and kind.startswith("mlp."):
                for expert in range(experts):
                    found[f"model.layers.{layer}.mlp.experts.{expert}.{kind[4:]}"] = sides
            else:
                found[f"model.layers.{layer}.{kind}"] = sides
    return found | {name: (64, 3) for name in also}


def write_run(folder, sides, *, r=8, steps=100, deltas=5, seed=0, finished=True, spread=1.0, cost=1, **config):
    """Write metrics.jsonl, ranks.jsonl, scores.jsonl and, of a finished run, run.json; config is that of run.json.

    `spread` is how far scores lie apart, `cost` what parameters are multiplied by.
    """
    folder.mkdir(parents=True)
    draw = np.random.default_rng(seed)
    sides = {name: (a * cost, b * cost) for name, (a, b) in sides.items()}
    cost = np.array([a + b + 1 for a, b in sides.values()])
    costs = torch.tensor(cost).repeat_interleave(r)
    allocations = [round(steps * (place + 1) / (deltas + 1)) for place in range(deltas)]
    head = {"step": 0, "format": 1, "score": "taylor", "unit": "params", "r": r, "every": 1}
    score_lines, rank_lines = [head | {"modules": list(sides), "sides": list(sides.values())}], []
    strength = draw.lognormal(0, spread, len(sides))
    for place, step in enumerate(allocations):
        budget = int(cost.sum() * (r - (r / 2) * (place + 1) / deltas))
        scores = (strength[:, None] * draw.lognormal(0, 0.5, (len(sides), r)) * cost[:, None]).astype(np.float32)
        flat = torch.from_numpy(scores.reshape(-1))
        kept = keep_best(flat, budget, costs)
        said = {"step": step, "budget": budget, "spent": int(costs[kept].sum())}
        ranks = dict(zip(sides, kept.view(-1, r).sum(1).tolist(), strict=True))
        rank_lines.append(said | {"ranks": ranks})
        gap = {"gap": relative_gap(flat, budget, costs)}
        score_lines.append(said | gap | encode(flat.numpy(), kept.numpy()))
    metrics = []
    for step in range(1, steps + 1, max(1, steps // 25)):
        skipped = 0 if step < steps / 2 else 2
        metrics.append({"step": step, "loss": 3 / step**0.2, "tokens_per_second": 900.0 + step})
        metrics[-1] |= {"adalora/budget": int(cost.sum() * r), "adalora/skipped_steps": skipped}
    metrics += [{"step": step, "eval_loss": 2.9 / step**0.2} for step in (steps // 2, steps)]
    for name, lines in (("metrics", metrics), ("ranks", rank_lines), ("scores", score_lines)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        summary = {
            "config": {"task": "causal_lm", "training": {"output_dir": str(folder)}, **config},
            "versions": {"torch": "2"}, "hardware": {"device": "cpu"}, "engine": "ddp", "world_size": 2,
            "total_step": steps, "final": {"eval_loss": 1.25}, "ranks": ranks, "wall_time_s": 75.0,
            "budget": {"unit": "params"}, "peak_memory_by_rank": [{"resident_bytes": 2**30}, {"resident_bytes": 2**31}],
        }  # fmt: skip
        (folder / "run.json").write_text(json.dumps(summary))
    return folder
