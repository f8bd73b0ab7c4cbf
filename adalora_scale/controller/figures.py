"""The figures that an allocator logs beside the loss."""

from __future__ import annotations

from torch import Tensor


def rank_figures(ranks: list[int]) -> dict[str, int]:
    """Describe the number of kept triplets of every matrix."""
    return {
        "rank_total": sum(ranks),
        "rank_min": min(ranks),
        "rank_max": max(ranks),
        "zero_rank_modules": ranks.count(0),
    }


def penalty_figures(penalty: Tensor, gradient_norm: Tensor, task_norm: Tensor | None) -> dict[str, float | None]:
    """Describe the orthogonality penalty and its gradient beside the task's.

    Args:
        penalty, gradient_norm: () the penalty and the norm of its gradient.
        task_norm: () the norm of the adapters' gradient without it, None where the engine does not show it whole.
    """
    ratio = None
    if task_norm is not None:
        ratio = gradient_norm.item() / task_norm.item() if task_norm > 0 else 0.0
    return {"orth_loss": penalty.item(), "orth_grad_norm": gradient_norm.item(), "orth_grad_ratio": ratio}
