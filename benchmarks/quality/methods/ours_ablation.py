"""The paper's own ablation (arXiv 2303.10512, section 4.5): its method with one part taken out or replaced."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.methods.ours import Ours


def _paper(name: str, label: str, *, init: float = 1.5, **options: Any) -> Ours:
    return Ours(f"paper_{name}", f"paper, {label}", init=init, preset="paper", budget_unit="params", **options)


METHODS = (
    _paper("no_allocation", "no allocation", init=1),
    _paper("magnitude", "scored by the size of λ", score="magnitude"),
    _paper("sensitivity", "scored by sensitivity alone", score="sensitivity"),
    _paper("no_penalty", "no penalty", orth_reg_weight=0.0),
    _paper("one_shot", "pruned in one shot at 70 %", tinit=0.695, tfinal=0.3),
)
