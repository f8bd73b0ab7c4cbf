"""The score at work: its statistics of this rank's spans, when they are updated, and what they say of triplets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from adalora_scale.adalora.score import Score, ScoredPiece, add_column_sums
from adalora_scale.engines import Sharding


class Scoring:
    """The statistics of one allocator.

    Args:
        score: what is kept and when.
        sharding: where the adapters are. Spans are asked for at every use, so an engine may give them other memory.
        final_step: the step of the final allocation.
    """

    def __init__(self, score: Score, sharding: Sharding, final_step: int) -> None:
        self.score, self._sharding, self._final_step = score, sharding, final_step
        self._pieces: dict[int, ScoredPiece] = {}  # by index of the span; empty after the final allocation
        self._waiting: tuple[list[int], list[Tensor]] | None = None

    @property
    def statistics(self) -> dict[str, list[Tensor]]:
        """The score's statistics by name, one (length,) tensor a span of its factors; none once released."""
        names = self.score.statistics if self._pieces else ()
        return {name: [piece.statistics[name] for piece in self._pieces.values()] for name in names}

    def begin(self) -> None:
        """Set every statistic to zero."""
        self._pieces = {
            index: ScoredPiece(
                span.tensor.factor,
                span.tensor.rows,
                {name: torch.zeros_like(span.weight) for name in self.score.statistics},
            )
            for index, span in enumerate(self._sharding.spans)
            if span.tensor.factor in self.score.factors
        }

    def release(self) -> None:
        """Give the statistics' memory back: nothing is allocated any more."""
        self._pieces, self._waiting = {}, None

    def see(
        self, indices: list[int], gradients: list[Tensor], scale: Tensor | float, *, penalised: bool, step: int
    ) -> None:
        """Show the gradients of a call of the optimizer, before its update; called with and without the penalty.

        Args:
            indices: spans that the call updates.
            gradients: their (length,) gradients.
            scale: factor the gradients carry (a GradScaler's).
            penalised: whether the penalty's gradient has been added to them.
            step: the step in progress.
        """
        if penalised != self.score.sees_penalty:
            return
        if step >= self._final_step and not self.score.observes_final_step:
            return
        chosen = [(i, g) for i, g in zip(indices, gradients, strict=True) if i in self._pieces]
        if not chosen:
            return
        indices, gradients = [i for i, _ in chosen], [g for _, g in chosen]
        if self.score.after_update:  # a copy: optimizers may change gradients in place
            self._waiting = indices, list(torch._foreach_div(gradients, scale))
        else:
            self._observe(indices, gradients, scale)

    def updated(self) -> None:
        """Observe what was waiting for the update of the call in progress."""
        if self._waiting is not None:
            self._observe(*self._waiting, 1.0)
            self._waiting = None

    def _observe(self, indices: list[int], gradients: list[Tensor], scale: Tensor | float) -> None:
        spans = self._sharding.spans
        self.score.observe([self._pieces[i] for i in indices], [spans[i].weight for i in indices], gradients, scale)

    def add_scores(self, out: Tensor) -> None:
        """Add up S_k of every triplet over all spans of all ranks; one all-reduce.

        Args:
            out: (modules · r,) float32 zeros, overwritten with the scores ordered by (module, k).
        """
        spans = [self._sharding.spans[index] for index in self._pieces]
        values = self.score.contributions(list(self._pieces.values()), [span.weight for span in spans])
        for span, value in zip(spans, values, strict=True):
            first = span.tensor.layer * span.tensor.r
            add_column_sums(out[first : first + span.tensor.r], value, start=span.start)
        self._sharding.all_reduce(out)

    # ---- state --------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Name what `state` holds before the final allocation."""
        names = [span.tensor.name for span in self._sharding.spans if span.tensor.factor in self.score.factors]
        return [f"{statistic}.{name}" for name in names for statistic in self.score.statistics]

    def state(self) -> dict[str, Tensor]:
        """Return copies of the statistics, named `<statistic>.<module>.<factor>`; nothing once released."""
        return {
            f"{name}.{self._sharding.spans[index].tensor.name}": value.clone()
            for index, piece in self._pieces.items()
            for name, value in piece.statistics.items()
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`, wherever its tensors are."""
        self.begin()
        for index, piece in self._pieces.items():
            for name, value in piece.statistics.items():
                value.copy_(state[f"{name}.{self._sharding.spans[index].tensor.name}"])
