"""The one all-reduce of an optimizer step.

Gram matrices of whole rows, the elements of split rows, and two sums of squared gradients travel in one flat float32
buffer. What comes back completes the penalty and its gradient, and says whether every gradient on every rank is finite.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from adalora_scale.adalora.orthogonality import add_penalty_gradient, gradient_norm, gram, penalty
from adalora_scale.controller.rows import FactorRows
from adalora_scale.engines.ranks import everywhere
from adalora_scale.engines.span import Sharding
from adalora_scale.errors import Unsupported, UserError


@dataclass
class StepSums:
    """What all ranks know of the step in progress."""

    adapter_squares: Tensor
    """Sum of the adapters' squared gradients."""
    finite: bool
    """Whether every gradient of every parameter of the optimizer is, on every rank."""
    penalty: Tensor
    """The orthogonality penalty R."""
    penalty_gradient_norm: Tensor
    """Norm of its gradient."""


class _Factors:
    """The factors of one rank, with their places in the buffer; there is one such rank unless adapters were compacted.

    Args:
        sharding: where the adapters are.
        indices: the spans of these factors.
        r: their number of columns.
    """

    def __init__(self, sharding: Sharding, indices: list[int], r: int) -> None:
        spans = sharding.spans
        device = spans[0].weight.device
        self.indices, self._r, self._sharding = indices, r, sharding
        self._layer_of_factor = torch.tensor([spans[i].tensor.layer for i in indices], device=device)
        self._rows = FactorRows(
            own=[(spans[i].start, spans[i].weight.numel()) for i in indices],
            extents=[[rank[i] for i in indices] for rank in sharding.extents],
            r=r,
            device=device,
        )
        self.split_rows = self._rows.slots
        self.size = len(indices) * r * r + self.split_rows * r
        self._multiplier = torch.zeros(0)
        self._split = torch.zeros(0)

    def fill(self, buffer: Tensor) -> None:
        """Write Grams of whole rows and the elements of split rows into (size,) zeros."""
        grams, split = self._parts(buffer)
        weights = [self._sharding.spans[i].weight for i in self.indices]
        grams.copy_(gram(self._rows.whole(weights), self._r))
        self._rows.write_split(split, weights)

    def complete(self, buffer: Tensor, weight: float, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return this rank's part of the penalty and of its gradient's norm, from the summed buffer."""
        grams, split = self._parts(buffer)
        if self._rows.slots:
            grams.index_add_(0, self._rows.factor_of_slot, split.unsqueeze(2) * split.unsqueeze(1))
        kept = None if keep is None else keep.view(-1, self._r)[self._layer_of_factor]
        value, self._multiplier = penalty(grams, weight, kept)
        self._split = split
        return value, gradient_norm(grams, self._multiplier)

    def add_gradient(self, given: dict[int, Tensor], scale: Tensor | float) -> None:
        """Add the penalty's gradient to those of the gradients, span → (length,), that are these factors'."""
        present = [number for number, index in enumerate(self.indices) if index in given]
        targets = [given[self.indices[number]] for number in present]
        weights = [self._sharding.spans[self.indices[number]].weight for number in present]
        multiplier = self._multiplier[present]
        whole_targets = self._rows.whole(targets, present)
        add_penalty_gradient(whole_targets, self._rows.whole(weights, present), multiplier, scale)
        if self._rows.slots:
            updates = torch.bmm(self._split.unsqueeze(1), self._multiplier[self._rows.factor_of_slot]).squeeze(1)
            self._rows.add_split(dict(zip(present, targets, strict=True)), updates * scale)

    def _parts(self, buffer: Tensor) -> tuple[Tensor, Tensor]:
        n, r = len(self.indices), self._r
        return buffer[: n * r * r].view(n, r, r), buffer[n * r * r :].view(-1, r)


class StepReduction:
    """Sums over ranks, and the penalty's gradient for this rank's spans.

    Args:
        sharding: where the adapters are.
        matrices: adapted matrices of the model, those without a triplet included.
        weight: orth_reg_weight; with 0 only the sums of squares are reduced.
    """

    def __init__(self, sharding: Sharding, matrices: int, weight: float) -> None:
        self._sharding, self._weight = sharding, weight
        self._device = sharding.spans[0].weight.device
        by_rank: dict[int, list[int]] = {}
        for index, span in enumerate(sharding.spans):
            if span.tensor.factor != "lora_E":
                by_rank.setdefault(span.tensor.r, []).append(index)
        self._groups = [_Factors(sharding, by_rank[r], r) for r in sorted(by_rank)]
        self._shares = [weight * (len(group.indices) / (2 * matrices)) for group in self._groups]

    @property
    def split_rows(self) -> int:
        """Rows of which several ranks hold pieces."""
        return sum(group.split_rows for group in self._groups)

    def run(self, squares: Tensor, keep: Tensor | None) -> StepSums:
        """Reduce over ranks and prepare the penalty's gradient.

        Args:
            squares: (2,) this rank's sums of squared gradients, of the adapters and of everything.
            keep: (modules · r,) bool after the final allocation when pruned triplets are zero, else None.

        Raises:
            UserError, Unsupported: a rank withdrew from the step.
        """
        zero = torch.zeros((), dtype=torch.float32, device=self._device)
        if self._weight == 0:
            self._sharding.all_reduce(squares)
            self._sharding.agree(squares)
            return StepSums(squares[0], self._finite(squares[1]), zero, zero)
        sizes = [group.size for group in self._groups]
        buffer = torch.zeros(sum(sizes) + 2, dtype=torch.float32, device=self._device)
        parts = buffer[:-2].split(sizes)
        for group, part in zip(self._groups, parts, strict=True):
            group.fill(part)
        buffer[-2:] = squares
        self._sharding.all_reduce(buffer)
        self._sharding.agree(buffer[-2:])
        finite = self._finite(buffer[-1])
        values, norms = [], []
        for group, part, share in zip(self._groups, parts, self._shares, strict=True):
            value, norm = group.complete(part, share, keep)
            values.append(value)
            norms.append(norm)
        if len(values) == 1:
            return StepSums(buffer[-2], finite, values[0], norms[0])
        return StepSums(buffer[-2], finite, torch.stack(values).sum(), torch.stack(norms).norm())

    def withdraw(self, error: UserError | Unsupported) -> NoReturn:
        """Raise this rank's error on every rank: the others are, or will be, in `run` of the same step.

        Else they would wait for this rank in their next collective until the group's timeout.

        Raises:
            UserError, Unsupported: as `error`, with the rank's number unless all ranks say the same.
        """
        size = sum(group.size for group in self._groups) if self._weight else 0
        buffer = torch.full((size + 2,), torch.nan, dtype=torch.float32, device=self._device)
        self._sharding.all_reduce(buffer)
        self._sharding.agree(buffer[-2:])
        everywhere(lambda: _raise(error))
        raise error

    def _finite(self, all_squares: Tensor) -> bool:
        finite = bool(torch.isfinite(all_squares))
        if not finite:
            everywhere(lambda: None)  # not a gradient but a rank that withdrew from the step?
        return finite

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
        for group in self._groups:
            group.add_gradient(given, scale)


def _raise(error: Exception) -> NoReturn:
    raise error


def sum_of_squares(tensors: list[Tensor]) -> Tensor:
    """Return the sum of squares in float32; a NaN or infinity anywhere makes it non-finite."""
    if not tensors:
        return torch.zeros((), dtype=torch.float32)
    return torch.stack(torch._foreach_norm(tensors, dtype=torch.float32)).square().sum()
