"""Which triplets of an adapter stay when it is cut to a number of parameters, without data.

The update of every matrix is taken as a sum of rank-one terms: its singular triplets, or the triplets it was trained
with. Over all matrices together those of the largest singular values stay (PARA, arXiv 2604.27796), or those of the
highest score for what they cost, as in a run. ΔW (out, in) itself is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from adalora_scale.adalora.allocation import keep_best, spend
from adalora_scale.errors import UserError
from adalora_scale.export.adapter_file import Update


@dataclass(frozen=True)
class Size:
    """A number of parameters, as `--prune-to` says it: absolute, or a share of what there is."""

    text: str

    def __post_init__(self) -> None:
        try:
            value = Fraction(self.text.removesuffix("%")) if self.is_share else int(self.text)
        except (ValueError, ArithmeticError):
            value = 0
        if value <= 0 or (self.is_share and value > 100):
            raise UserError(
                f"--prune-to is '{self.text}'; give a number of parameters, such as 100000, or a share from 0% to 100%."
            )

    @property
    def is_share(self) -> bool:
        """Whether it is a percentage."""
        return self.text.endswith("%")

    def of(self, parameters: int) -> int:
        """Return the number that it means for an adapter of so many parameters, rounded down."""
        return int(parameters * Fraction(self.text[:-1]) / 100) if self.is_share else int(self.text)


class Cut(NamedTuple):
    """What stays of one matrix."""

    update: Update
    """The kept triplets with the scaling in e: of the SVD, e ≥ 0 in falling order."""
    dropped: float
    """‖ΔW − ΔW_kept‖² (Frobenius)."""
    whole: float
    """‖ΔW‖²."""
    places: list[int] | None = None
    """Which of the adapter's own triplets they are; None: of the SVD."""


def cut_by_singular_values(updates: Mapping[str, Update], costs: Mapping[str, int], budget: int) -> dict[str, Cut]:
    """Keep, over all matrices, the singular triplets of the largest singular values that the budget pays for.

    Triplets are taken in the order of σ until one does not fit; what is left goes, in the same order, to those that
    still fit. Singular values that are zero but for rounding are no triplets: leaving them out changes nothing.

    Args:
        updates: matrix → ΔW = B diag(e) A with the scaling in e.
        costs: matrix → parameters of one triplet.
        budget: parameters that may be kept.

    Returns:
        Matrix → what stays, with (r', in_features), (r',) and (out_features, r') factors. Never more than the budget,
        and less than any triplet left out costs remains of it.

    Source: arXiv 2604.27796.
    """
    triplets = {name: singular_triplets(update) for name, update in updates.items()}
    order = torch.sort(torch.cat([t.e for t in triplets.values()]), descending=True, stable=True).indices
    mask = spend(order, budget, _each(triplets, costs))
    cuts = {}
    for (name, t), keep in zip(triplets.items(), mask.split([t.e.numel() for t in triplets.values()]), strict=True):
        squares = t.e.square()
        kept = Update(t.a[keep].float(), t.e[keep].float(), t.b[:, keep].float())
        cuts[name] = Cut(kept, float(squares[~keep].sum()), float(squares.sum()))
    return cuts


def cut_by_scores(
    updates: Mapping[str, Update], scores: Mapping[str, Tensor], costs: Mapping[str, int], budget: int
) -> dict[str, Cut]:
    """Keep the adapter's own triplets of the highest score for what they cost, as a run with a budget in parameters.

    Args:
        updates, costs, budget: as in `cut_by_singular_values`.
        scores: matrix → (r,) score of every triplet.

    Source: `adalora_scale.adalora.allocation.keep_best`; arXiv 2303.10512 eq. 7.
    """
    mask = keep_best(torch.cat([scores[name] for name in updates]), budget, _each(updates, costs))
    cuts = {}
    for (name, u), keep in zip(updates.items(), mask.split([u.e.numel() for u in updates.values()]), strict=True):
        # The dropped triplets are not orthogonal to each other, so their squares do not just add up.
        dropped = singular_triplets(Update(u.a[~keep], u.e[~keep], u.b[:, ~keep])).e.square().sum()
        whole = singular_triplets(u).e.square().sum()
        kept = Update(u.a[keep], u.e[keep], u.b[:, keep])
        cuts[name] = Cut(kept, float(dropped), float(whole), keep.nonzero().flatten().tolist())
    return cuts


def singular_triplets(update: Update) -> Update:
    """Return the SVD ΔW = U diag(σ) Vᵀ of a low-rank product, in float64, without what is zero but for rounding.

    B = Q_B R_B, Aᵀ = Q_A R_A, and the SVD of the (r, r) core R_B diag(e) R_Aᵀ: O((in + out) r²).

    Args:
        update: A (r, in_features), e (r,), B (out_features, r).

    Returns:
        Vᵀ (k, in_features), σ (k,) in falling order and U (out_features, k), k ≤ r.
    """
    a, e, b = (part.double() for part in (update.a, update.e, update.b))
    qb, rb = torch.linalg.qr(b)
    qa, ra = torch.linalg.qr(a.T)
    u, s, vt = torch.linalg.svd((rb * e) @ ra.T, full_matrices=False)
    # The rounding is that of the products, whose terms may be larger than their sum.
    terms = e.abs() * a.norm(dim=1) * b.norm(dim=0)
    k = int((s > terms.sum() * max(a.shape[1], b.shape[0]) * torch.finfo(s.dtype).eps).sum())
    return Update((vt[:k] @ qa.T), s[:k], qb @ u[:, :k])


def _each(triplets: Mapping[str, Update], costs: Mapping[str, int]) -> Tensor:
    """Return (triplets,) what each costs."""
    counts = torch.tensor([t.e.numel() for t in triplets.values()])
    return torch.tensor([costs[name] for name in triplets]).repeat_interleave(counts)
