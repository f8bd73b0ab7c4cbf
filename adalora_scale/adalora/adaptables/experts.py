"""A projection of a layer's experts: a matrix an expert, each with triplets of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from adalora_scale.adalora.adaptables.base import Adaptable
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.products import grouped_product


class ExpertProjection(Adaptable[ExpertLinear]):
    """Two grouped products beside the base's, λ · s between them; ΔW is never made."""

    types = (ExpertLinear,)
    linear = True

    def matrices(self, base: ExpertLinear) -> int:
        return base.experts

    def sides(self, base: ExpertLinear) -> tuple[int, int]:
        return base.in_features, base.out_features

    def is_transposed(self, base: ExpertLinear) -> bool:
        return base.transposed

    def add_update(
        self,
        base: ExpertLinear,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        e: Tensor,
        b: Tensor,
        dropout: Callable[[Tensor], Tensor],
        *more: Any,
    ) -> Tensor:  # x: (S, rows of A), y: (S, rows of B), by expert
        (groups,) = more
        right, left = (factor.view(base.experts, -1, factor.shape[-1]) for factor in (a, b))
        scale = e.view(base.experts, -1).index_select(0, groups.expert_of_row)
        inner = grouped_product(dropout(x), right, groups) * scale
        return y + grouped_product(inner, left, groups, turned=True).to(y.dtype)
