"""One tensor over all experts of a layer, read by slices from wherever a checkpoint keeps it.

Transformers keeps a projection of all experts as one tensor, (experts, out, in) or turned. Checkpoints hold it so, or
hold a tensor an expert (and one for the gate, one for the rest of it), which transformers stacks and joins while it
loads. The second kind is described here, so that a slice of the joined tensor is slices of the parts: expert e's rows
are those of its own tensors, one after another.

Source: transformers.core_model_loading, MergeModulelist(dim=0) and Concatenate(dim=1).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from adalora_scale.errors import UserError
from adalora_scale.quantization.base_files import Parts


@dataclass
class Collected:
    """The parts of one tensor as they are found."""

    sources: int
    """Tensors an expert: 2 for a gate and what it gates."""
    found: dict[int, dict[int, str]] = field(default_factory=dict)
    """Expert → place among its tensors → name in the checkpoint."""

    def add(self, expert: int, place: int, name: str) -> None:
        """Take a tensor."""
        self.found.setdefault(expert, {})[place] = name

    def parts(self) -> Parts:
        """Return all of them, expert by expert.

        Raises:
            UserError: an expert, or a tensor of one, is missing.
        """
        some = next(iter(next(iter(self.found.values())).values()))
        for expert in range(max(self.found) + 1):
            if len(self.found.get(expert, {})) != self.sources:
                raise UserError(
                    f"the checkpoint lacks a tensor of expert {expert} beside '{some}'; download the model again."
                )
        return tuple(tuple(self.found[e][place] for place in range(self.sources)) for e in range(len(self.found)))


def place_of(converter: WeightConverter, pattern: str, key: str) -> tuple[int, int] | None:
    """Return (expert, place among its tensors) of a checkpoint's tensor that a converter takes.

    Args:
        converter: transformers'.
        pattern: the one of its sources that matches.
        key: the tensor's name after renamings.

    Returns:
        None where the converter does more than to stack experts and join their rows.
    """
    operations: Sequence[object] = converter.operations
    kinds = [(type(operation), getattr(operation, "dim", None)) for operation in operations]
    joins = [(MergeModulelist, 0), (Concatenate, 1)]
    wanted = joins if len(converter.source_patterns) > 1 else joins[:1]
    if kinds != wanted or len(converter.target_patterns) != 1 or pattern.count("*.") != 1:
        return None
    number = re.search(pattern.replace("*.", r"(?P<expert>\d+)\."), key)  # "*." is any name there, the rest a regex
    return None if number is None else (int(number["expert"]), list(converter.source_patterns).index(pattern))
