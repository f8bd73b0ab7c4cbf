"""Tokens in the order of their experts, so that one product serves all experts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Groups:
    """Which rows of a (S, features) tensor belong to which expert; rows of one expert lie next to each other."""

    ends: Tensor
    """(experts,) int32: where each expert's rows end; without a token, where the one's before do."""
    expert_of_row: Tensor
    """(S,) int64."""
    loop: bool = False
    """Whether products go expert by expert (`experts_implementation: eager`) instead of through one kernel."""

    @property
    def experts(self) -> int:
        """Number of experts."""
        return self.ends.shape[0]


def by_expert(top_k_index: Tensor, experts: int, *, loop: bool = False) -> tuple[Groups, Tensor]:
    """Order the pairs of a token and one of its experts by expert.

    Args:
        top_k_index: (tokens, k) int64, the experts of each token.
        experts: how many there are.
        loop: see `Groups`.

    Returns:
        The groups, and (tokens · k,) int64: the pair, counted along `top_k_index.flatten()`, that stands in each row.
        Pairs of one expert stay in their order.
    """
    expert_of_row, order = torch.sort(top_k_index.reshape(-1), stable=True)
    return Groups(_ends(expert_of_row, experts), expert_of_row, loop), order


def equal_parts(rows: int, experts: int, device: torch.device) -> Groups:
    """Return the groups of rows that lie by expert already, the same number for each."""
    expert_of_row = torch.arange(experts, device=device).repeat_interleave(rows // experts)
    return Groups(_ends(expert_of_row, experts), expert_of_row)


def _ends(expert_of_row: Tensor, experts: int) -> Tensor:
    numbers = torch.arange(experts, device=expert_of_row.device, dtype=expert_of_row.dtype)
    return torch.searchsorted(expert_of_row, numbers, right=True, out_int32=True)
