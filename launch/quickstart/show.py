"""Print what a quickstart run showed: exact match before and after, plain LoRA beside it, and where the ranks went.

python launch/quickstart/show.py runs/quickstart
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any


def main(run: Path) -> None:
    """Print the table of figures and the map of ranks of the run in `run`."""
    before = _read(run.with_name(run.name + ".before.json"))
    lora = _read(run.with_name(run.name + "-lora") / "run.json")
    ours = _read(run / "run.json")
    allocations = [json.loads(line) for line in (run / "ranks.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [record["loss"] for record in losses if "loss" in record]

    final = allocations[-1]
    afters = [run.with_name(run.name + ".after.json"), *sorted(run.parent.glob(f"{run.name}-seed-*.after.json"))]
    adapted = [_read(path)["exact_match"] for path in afters]
    plain = [
        _read(path.with_name(path.name.removesuffix(".after.json") + "-lora") / "run.json")["exact_match"]
        for path in afters
    ]
    print(f"\n{'':24}{'exact match':>16}   parameters")
    print(f"{'untouched base model':24}{before['exact_match']:>16.1%}   {'–':>10}")
    print(f"{'plain LoRA':24}{_over_seeds(plain):>16}   {lora['adapter_parameters']:>10,}")
    print(f"{'AdaLoRA':24}{_over_seeds(adapted):>16}   {ours['budget']['spent']:>10,}")
    if len(afters) > 1:
        differences = [100 * (ours - lora) for ours, lora in zip(adapted, plain, strict=True)]
        mean, deviation = statistics.fmean(differences), statistics.stdev(differences)
        print(f"\n{len(afters)} seeds; AdaLoRA less LoRA of the same seed: {mean:+.1f} ± {deviation:.1f} points.")
    print(f"\nAdaLoRA's loss fell from {losses[0]:.3f} to {losses[-1]:.3f} in {ours['total_step']} steps.")
    print(f"Its {len(allocations)} allocations spent the budget where it helps; ranks by layer:\n")
    print(rank_map(final["ranks"]))
    print(f"\nThe adapter is in {run}; PEFT loads it too: PeftModel.from_pretrained(base_model, '{run}')")


def _over_seeds(shares: list[float]) -> str:
    """Return a share, with its standard deviation over seeds where there are several."""
    if len(shares) == 1:
        return f"{shares[0]:.1%}"
    return f"{100 * statistics.fmean(shares):.1f} ± {100 * statistics.stdev(shares):.1f}%"


def rank_map(ranks: dict[str, int]) -> str:
    """Return a text table of ranks, one row a kind of matrix, one column a layer."""
    kinds: dict[str, dict[int, int]] = {}
    for name, rank in ranks.items():
        match = re.search(r"\.(\d+)\.", name)
        layer = int(match.group(1)) if match else 0
        kinds.setdefault(name.rsplit(".", 1)[-1], {})[layer] = rank
    layers = sorted({layer for row in kinds.values() for layer in row})
    lines = ["    " + f"{'layer':12}" + "".join(f"{layer:>5}" for layer in layers)]
    for kind, row in kinds.items():
        lines.append("    " + f"{kind:12}" + "".join(f"{row.get(layer, '–'):>5}" for layer in layers))
    return "\n".join(lines)


def _read(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart"))
