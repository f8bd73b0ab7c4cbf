"""What `adalora.preset` decides: the values of the keys that the config leaves open.

To add a preset write one entry here; docs/config.md shows the table, and a test compares them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Preset:
    """One way to run the method; each attribute is the `adalora` key of its name where that is not set."""

    score: str
    init_weights: Literal["adalora", "lora"]
    budget_unit: Literal["params", "triplets"]
    init_ratio: float
    """init_r as a multiple of target_r."""
    init_least: int
    """init_r where that is less: of two triplets a matrix there is little to choose."""
    lora_alpha: float | None
    """None: twice target_r, as LoRA is mostly run."""
    orth_reg_weight: float
    tinit: float
    tfinal: float

    def values(self, target_r: int) -> dict[str, Any]:
        """Return the value of every key for a run that ends at `target_r`; at least one triplet a matrix is pruned."""
        keys = dataclasses.asdict(self)
        keys["init_r"] = max(round(keys.pop("init_ratio") * target_r), keys.pop("init_least"), target_r + 1)
        if self.lora_alpha is None:
            keys["lora_alpha"] = 2.0 * target_r
        return keys


_PAPER = Preset(
    score="paper",
    init_weights="adalora",
    budget_unit="triplets",
    init_ratio=1.5,
    init_least=0,
    lora_alpha=32,
    orth_reg_weight=0.1,
    tinit=0.1,
    tfinal=0.3,
)
"""arXiv 2303.10512: its score, SVD form from the start, penalty, budget in triplets."""

PRESETS = {
    "default": Preset(
        score="taylor",
        init_weights="lora",
        budget_unit="params",
        init_ratio=2,
        init_least=4,
        lora_alpha=None,
        orth_reg_weight=0.0,
        tinit=0.1,
        tfinal=0.5,
    ),
    "paper": _PAPER,
    "peft": dataclasses.replace(_PAPER, score="peft"),
}
"""The presets by name."""
