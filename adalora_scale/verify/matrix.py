"""The equivalence matrix: every engine and variant against one process in float64, by DESIGN.md's criterion."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.adalora.matrices import matrix_names
from adalora_scale.verify.engines import EVALUATED, SINGLE, Outcome, train
from adalora_scale.verify.engines import why_not as engine_why_not
from adalora_scale.verify.float64 import Float64
from adalora_scale.verify.margins import LEAST, Margins
from adalora_scale.verify.problem import (
    Problem,
    adapter_weights,
    matrix_places,
    matrix_weights,
    reference_options,
    token_loss,
)
from adalora_scale.verify.reference import FACTORS, ReferenceAdaLora

ALL_TOLERANCE = 1e-5
"""Largest ‖w − w_ref‖ / ‖w_ref‖ over all adapters together."""
TENSOR_TOLERANCE = 5e-5
"""The same for each tensor."""
BF16_TOLERANCE = 0.02
"""Largest relative difference of a bf16 cell's final loss from the one-process bf16 run's."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One row of the table."""

    engine: str
    variant: str
    ranks: int
    verdict: str
    """pass, fail or not run."""
    reason: str = ""
    """Why it failed or was not run."""
    masks_equal_over_ranks: bool | None = None
    allocations: int | None = None
    allocations_equal: int | None = None
    """Allocations whose mask is the float64 reference's; None for bf16."""
    distance: float | None = None
    """‖w − w_ref‖ / ‖w_ref‖ over all adapters, the largest of all ranks."""
    worst: float | None = None
    worst_tensor: str | None = None
    min_gap: float | None = None
    """Smallest relative gap at the cut of all allocations."""
    eval_loss: float | None = None
    reference_loss: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return asdict(self)


def expected_outcome(variant: str, problem: Problem) -> Outcome:
    """Train what a cell of `variant` is compared with, in this process alone.

    bf16 cells are compared with one process in bf16, all others with the float64 reference.
    """
    if variant == "bf16":
        return train(SINGLE, "bf16", problem)
    config, adapted = problem.config, problem.adapted_model()
    base = problem.exact_model().requires_grad_(False).to(problem.device)
    reference = ReferenceAdaLora(
        matrix_weights(adapted),
        reference_options(
            config,
            problem.steps,
            lr=problem.learning_rate,
            weight_decay=problem.weight_decay,
            max_grad_norm=problem.max_grad_norm if variant == "clip" else None,
        ),
        matrix_places(adapted, base),
    )
    batches = problem.batches(base.config.vocab_size)  # type: ignore[union-attr, arg-type]
    with Margins(base) as margins, Float64():
        for batch in batches:
            reference.train_step(base, partial(token_loss, batch=batch))
        weights = {name: adapter.weight for name, adapter in reference.adapters.items()}
        with torch.no_grad():
            losses = [
                reference.loss(base, partial(token_loss, batch=batch), weights).item() for batch in batches[:EVALUATED]
            ]
    names = {module: matrix_names(module, layer.matrices) for module, layer in adapter_layers(adapted)}
    shapes = {module: {f: w.shape for f, w in factors.items()} for module, factors in adapter_weights(adapted).items()}
    return Outcome(
        masks={
            step: {module: [bit for name in own for bit in mask[name]] for module, own in names.items()}
            for step, mask in reference.masks.items()
        },
        weights={
            module: {f: torch.cat([weights[name][f] for name in own]).view(shapes[module][f]).cpu() for f in FACTORS}
            for module, own in names.items()
        },
        eval_loss=sum(losses) / len(losses),
        margin=margins.smallest,
    )


def expected_outcomes(variants: Sequence[str], problem: Problem) -> dict[str, Outcome]:
    """Return the expected outcome of every variant, the work divided over ranks; a collective call."""
    kinds = list(dict.fromkeys(_kind(variant) for variant in variants))
    known = {"bf16": expected_outcome("bf16", problem)} if "bf16" in kinds else {}  # all ranks attach, or none
    kinds = [kind for kind in kinds if kind != "bf16"]
    mine = {
        kind: expected_outcome(kind, problem)
        for index, kind in enumerate(kinds)
        if index % problem.ranks == dist.get_rank()
    }
    everyone: list[dict[str, Outcome]] = [{} for _ in range(problem.ranks)]
    dist.all_gather_object(everyone, mine)
    known |= {kind: outcome for share in everyone for kind, outcome in share.items()}
    return {variant: known[_kind(variant)] for variant in variants}


def _kind(variant: str) -> str:
    """Accumulation and checkpointing change nothing in exact arithmetic."""
    return variant if variant in ("clip", "bf16") else "plain"


def run_matrix(
    engines: Sequence[str],
    variants: Sequence[str],
    problem: Problem,
    *,
    expected: dict[str, Outcome] | None = None,
    on_cell: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Run the cells one after the other in this process group; a collective call.

    Args:
        engines, variants: the matrix's sides.
        problem: what is trained.
        expected: outcomes to compare with, by variant; None makes them.
        on_cell: called with every row as it is finished.
    """
    cells = []
    if expected is None:
        expected = expected_outcomes(variants, problem)
    for engine in engines:
        for variant in variants:
            if reason := why_not(engine, variant, problem):
                cell = Cell(engine=engine, variant=variant, ranks=problem.ranks, verdict="not run", reason=reason)
            else:
                cell = judge(engine, variant, train(engine, variant, problem), expected[variant])
            cells.append(cell)
            on_cell(cell)
    return cells


def why_not(engine: str, variant: str, problem: Problem) -> str:
    """Return why a cell cannot run here, or nothing."""
    if reason := engine_why_not(engine, problem.ranks):
        return reason
    if variant == "bf16" and problem.device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return "this GPU has no bf16"
    return ""


def judge(engine: str, variant: str, outcome: Outcome, expected: Outcome) -> Cell:
    """Compare what every rank has with the expected outcome; a collective call, the same answer on every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    own = None if variant == "bf16" else distances(outcome.weights, expected.weights)
    dist.all_gather_object(everyone, (outcome.masks, own))
    same = all(masks == everyone[0][0] for masks, _ in everyone)
    reasons = [] if same else ["masks differ between ranks"]
    allocations, equal, together, worst, tensor = len(outcome.masks), None, None, None, None
    if expected.margin < LEAST:
        reasons.append(f"a token came within {expected.margin:.1e} of a tie between experts: rounding may decide")
    if allocations < 10:
        reasons.append(f"only {allocations} allocations")
    if variant == "bf16":
        if not abs(outcome.eval_loss - expected.eval_loss) <= BF16_TOLERANCE * expected.eval_loss:
            reasons.append("eval loss differs by more than 2 %")
    else:
        equal = min(_equal_masks(masks, expected.masks) for masks, _ in everyone)
        together = max(own[0] for _, own in everyone)
        worst, tensor = max(own[1:] for _, own in everyone)
        if equal < len(expected.masks) or allocations != len(expected.masks):
            reasons.append(f"{len(expected.masks) - equal} masks differ from the reference")
        if not together <= ALL_TOLERANCE:
            reasons.append(f"distance above {ALL_TOLERANCE:g}")
        if not worst <= TENSOR_TOLERANCE:
            reasons.append(f"a tensor's distance above {TENSOR_TOLERANCE:g}")
    return Cell(
        engine=engine,
        variant=variant,
        ranks=dist.get_world_size(),
        verdict="fail" if reasons else "pass",
        reason="; ".join(reasons),
        masks_equal_over_ranks=same,
        allocations=allocations,
        allocations_equal=equal,
        distance=together,
        worst=worst,
        worst_tensor=tensor,
        min_gap=min(outcome.gaps.values(), default=None),
        eval_loss=outcome.eval_loss,
        reference_loss=expected.eval_loss,
    )


def distances(
    weights: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]
) -> tuple[float, float, str]:
    """Return ‖w − w_ref‖ / ‖w_ref‖ over all tensors together, the worst single tensor's, and its name.

    A tensor that is zero in the reference and not here is infinitely far; one that is not finite too.
    """
    difference = total = 0.0
    worst, name = 0.0, ""
    for module, factors in expected.items():
        for factor, reference in factors.items():
            d = (weights[module][factor].double() - reference).square().sum().item()
            n = reference.square().sum().item()
            d = d if math.isfinite(d) else math.inf
            difference, total = difference + d, total + n
            own = math.sqrt(d / n) if n > 0 else math.inf if d > 0 else 0.0
            if own >= worst:
                worst, name = own, f"{module}.lora_{factor}"
    return math.sqrt(difference / total), worst, name


def _equal_masks(masks: dict[int, dict[str, list[bool]]], expected: dict[int, dict[str, list[bool]]]) -> int:
    return sum(masks.get(step) == mask for step, mask in expected.items())
