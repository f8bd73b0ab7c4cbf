"""The one all-reduce of an optimizer step.

Gram matrices of whole rows, the elements of split rows, and two sums of squared gradients travel in one flat float32
buffer. What comes back completes the penalty and its gradient, and says whether every gradient on every rank is finite.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adalora_scale.adalora.orthogonality import add_penalty_gradient, gradient_norm, gram, penalty
from adalora_scale.sharding.rows import FactorRows
from adalora_scale.sharding.span import Sharding


@dataclass
class StepSums:
    """What all ranks know of the step in progress."""

    adapter_squares: Tensor
    """Sum of the adapters' squared gradients."""
    all_squares: Tensor
    """Sum over all parameters of the optimizer; not finite if any gradient on any rank is not."""
    penalty: Tensor
    """The orthogonality penalty R."""
    penalty_gradient_norm: Tensor
    """Norm of its gradient."""


class StepReduction:
    """Sums over ranks, and the penalty's gradient for this rank's spans.

    Args:
        sharding: where the adapters are.
        r: triplets of every matrix.
        weight: orth_reg_weight; with 0 only the sums of squares are reduced.
    """

    def __init__(self, sharding: Sharding, r: int, weight: float) -> None:
        self._sharding, self._r, self._weight = sharding, r, weight
        spans = sharding.spans
        self._device = spans[0].weight.device
        self._factors = [i for i, span in enumerate(spans) if span.tensor.factor != "lora_E"]
        self._layer_of_factor = torch.tensor([spans[i].tensor.layer for i in self._factors], device=self._device)
        self._rows = FactorRows(
            own=[(spans[i].start, spans[i].weight.numel()) for i in self._factors],
            extents=[[rank[i] for i in self._factors] for rank in sharding.extents],
            r=r,
            device=self._device,
        )
        self._multiplier = torch.zeros(0)
        self._split = torch.zeros(0)

    def run(self, squares: Tensor, keep: Tensor | None) -> StepSums:
        """Reduce over ranks and prepare the penalty's gradient.

        Args:
            squares: (2,) this rank's sums of squared gradients, of the adapters and of everything.
            keep: (modules · r,) bool after the final allocation when pruned triplets are gone, else None.
        """
        n, r = len(self._factors), self._r
        zero = torch.zeros((), device=self._device)
        if self._weight == 0:
            self._sharding.all_reduce(squares)
            return StepSums(squares[0], squares[1], zero, zero)
        weights = self._weights()
        buffer = torch.zeros(n * r * r + self._rows.slots * r + 2, device=self._device)
        grams, split = buffer[: n * r * r].view(n, r, r), buffer[n * r * r : -2].view(-1, r)
        grams.copy_(gram(self._rows.whole(weights), r))
        self._rows.write_split(split, weights)
        buffer[-2:] = squares
        self._sharding.all_reduce(buffer)
        if self._rows.slots:
            grams.index_add_(0, self._rows.factor_of_slot, split.unsqueeze(2) * split.unsqueeze(1))
        kept = None if keep is None else keep.view(-1, r)[self._layer_of_factor]
        value, self._multiplier = penalty(grams, self._weight, kept)
        self._split = split
        return StepSums(buffer[-2], buffer[-1], value, gradient_norm(grams, self._multiplier))

    def add_penalty_gradient(self, indices: list[int], gradients: list[Tensor], scale: Tensor | float) -> None:
        """Add the penalty's gradient to these spans' gradients in place.

        Args:
            indices: spans, as in `Sharding.spans`.
            gradients: their (length,) gradients.
            scale: factor that the gradients carry (a GradScaler's).
        """
        if self._weight == 0:
            return
        given = dict(zip(indices, gradients, strict=True))
        present = [number for number, index in enumerate(self._factors) if index in given]
        targets = [given[self._factors[number]] for number in present]
        weights = [self._sharding.spans[self._factors[number]].weight for number in present]
        multiplier = self._multiplier[present]
        whole_targets = self._rows.whole(targets, present)
        add_penalty_gradient(whole_targets, self._rows.whole(weights, present), multiplier, scale)
        if self._rows.slots:
            updates = torch.bmm(self._split.unsqueeze(1), self._multiplier[self._rows.factor_of_slot]).squeeze(1)
            self._rows.add_split(dict(zip(present, targets, strict=True)), updates * scale)

    def _weights(self) -> list[Tensor]:
        return [self._sharding.spans[i].weight for i in self._factors]


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of squares in float32; a NaN or infinity anywhere makes it non-finite."""
    if not tensors:
        return torch.zeros(())
    return torch.stack(torch._foreach_norm(tensors, dtype=torch.float32)).square().sum()
