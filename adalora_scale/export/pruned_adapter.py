"""An adapter cut to a number of parameters, before it is written in any form: `export --prune-to`."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import PREFIX, WEIGHTS_NAME, AdapterFile
from adalora_scale.export.adapter_record import save_adapter_file
from adalora_scale.export.lora_config import lora_config, write_config
from adalora_scale.export.output import copy_tokenizer
from adalora_scale.export.peft_forms import record_of_part
from adalora_scale.export.pruning import Cut, Size, cut_by_scores, cut_by_singular_values
from adalora_scale.export.saved_scores import saved_scores
from adalora_scale.files import writing

SINGULAR_VALUES, SCORES = "singular-values", "scores"
CRITERIA = (SINGULAR_VALUES, SCORES)


@dataclass(frozen=True)
class Pruning:
    """What was cut, for the report."""

    by: str
    budget: int
    """Parameters that were allowed; modules that were trained in full are not counted."""
    parameters_before: int
    parameters: int
    triplets_before: int
    triplets: int
    kept: dict[str, int]
    """Matrix → triplets."""
    relative_error: float
    """‖ΔW − ΔW_pruned‖ / ‖ΔW‖ over all matrices (Frobenius)."""

    def as_dict(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __str__(self) -> str:
        ranks = list(self.kept.values())
        return (
            f"pruned by {self.by.replace('-', ' ')}: {self.parameters:,} of {self.parameters_before:,} parameters "
            f"(at most {self.budget:,}), {self.triplets:,} of {self.triplets_before:,} triplets (ranks {min(ranks)} to "
            f"{max(ranks)}, {ranks.count(0)} of rank 0); relative error of the updates {self.relative_error:.3g}"
        )


@contextlib.contextmanager
def pruned_adapter(
    adapter: AdapterFile, size: Size | None, *, by: str, source: Path
) -> Iterator[tuple[AdapterFile, Pruning | None]]:
    """Give the adapter cut to `size`, as a file of the same method in a temporary folder, and what was cut.

    An adapter that is no larger is given as it is. Plain LoRA leaves out matrices without a triplet, AdaLoRA keeps
    their names. The scaling of every matrix and whatever was trained in full stay as they are.

    Args:
        adapter: what to cut.
        size: how many parameters may stay; None: all.
        by: one of `CRITERIA`.
        source: the folder the user named: a checkpoint holds scores that the adapter made of it does not.

    Raises:
        UserError: no triplet fits, every update is zero, or there are no scores to go by.
    """
    if size is None:
        yield adapter, None
        return
    costs = {name: _cost(adapter, name) for name in adapter.modules}
    ranks = {name: shape.rank for name, shape in adapter.modules.items()}
    before, budget = _parameters(ranks, costs), size.of(_parameters(ranks, costs))
    scores = saved_scores(source) if by == SCORES else None
    if before <= budget:
        yield adapter, Pruning(by, budget, before, before, sum(ranks.values()), sum(ranks.values()), ranks, 0.0)
        return
    cheapest = min((name for name, rank in ranks.items() if rank), key=lambda name: costs[name])
    if budget < costs[cheapest]:
        raise UserError(
            f"--prune-to {size.text} allows {budget:,} parameters, and one triplet of '{cheapest}' has "
            f"{costs[cheapest]:,}, the fewest of all: raise it."
        )
    updates = {name: adapter.update(name) for name in adapter.modules}
    if scores is None:
        cuts = cut_by_singular_values(updates, costs, budget)
    else:
        cuts = cut_by_scores(updates, scores, costs, budget)
    whole = sum(cut.whole for cut in cuts.values())
    if whole == 0:
        raise UserError(
            f"{adapter.directory}: every update is zero, so there is nothing to keep; leave --prune-to out."
        )
    kept = {name: cut.update.e.numel() for name, cut in cuts.items()}
    error = (sum(cut.dropped for cut in cuts.values()) / whole) ** 0.5
    figures = Pruning(
        by, budget, before, _parameters(kept, costs), sum(ranks.values()), sum(kept.values()), kept, error
    )
    with tempfile.TemporaryDirectory(prefix="adalora_pruned_") as folder:
        with writing(Path(folder)):
            _write(adapter, cuts, Path(folder))
        yield AdapterFile(folder), figures


def _cost(adapter: AdapterFile, name: str) -> int:
    """Return the parameters of one triplet: in + out, and λ where the file has one."""
    shape = adapter.modules[name]
    return shape.in_features + shape.out_features + (adapter.method == "ADALORA")


def _parameters(ranks: dict[str, int], costs: dict[str, int]) -> int:
    return sum(rank * costs[name] for name, rank in ranks.items())


def _write(adapter: AdapterFile, cuts: dict[str, Cut], folder: Path) -> None:
    tensors: dict[str, Tensor] = {PREFIX + name: adapter.other(name) for name in adapter.others}
    tensors |= adapter.copied([name for name, cut in cuts.items() if cut.update.e.numel()])
    for name, cut in cuts.items():
        if adapter.method == "LORA" and not cut.update.e.numel():
            continue  # PEFT's LoRA has no rank 0
        tensors |= {f"{PREFIX}{name}.{key}": value for key, value in _factors(adapter, name, cut).items()}
    if adapter.method == "LORA":
        ranks = {name: cut.update.e.numel() for name, cut in cuts.items() if cut.update.e.numel()}
        config = lora_config(adapter, ranks, {name: adapter.scaling(name) for name in ranks}, base=None)
        metadata = record_of_part(adapter, complete=len(ranks) == len(cuts), settled=True)
    else:
        init_r: int = adapter.config["init_r"]
        places = {name: cut.places or range(cut.update.e.numel()) for name, cut in cuts.items()}
        masks = {name: [place in kept for place in range(init_r)] for name, kept in places.items()}
        own = adapter.stacks
        pattern = {
            f"{layer}.lora_E": [bit for name in own.get(layer, [layer]) for bit in masks[name]]
            for layer in adapter.layers
        }
        config = adapter.config | {"rank_pattern": pattern}
        metadata = record_of_part(adapter, complete=True, settled=True)
    save_adapter_file(tensors, folder / WEIGHTS_NAME, metadata)
    write_config(folder, config)
    copy_tokenizer(adapter.directory, folder)


def _factors(adapter: AdapterFile, name: str, cut: Cut) -> dict[str, Tensor]:
    """Return one matrix's tensors by the names and in the shapes of the adapter's method, without the scaling."""
    form, (a, b) = adapter.modules[name].form, (cut.update.a, cut.update.b)
    e = cut.update.e / adapter.scaling(name)
    if adapter.method == "LORA":
        root = e.sqrt()  # singular values: e ≥ 0
        return dict(zip(form.lora, form.stored(a * root[:, None], b * root), strict=True))
    a, b = form.stored(a, b)
    return dict(zip(form.adalora, (a, e.unsqueeze(1).contiguous(), b), strict=True))
