"""The score at work: its statistics of this rank's spans, when they are updated, and what they say of triplets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adalora_scale.adalora.score import Score, ScoredPiece
from adalora_scale.controller.arena import Arena, Block, begins_in, first_elements
from adalora_scale.controller.column_sums import ColumnSums
from adalora_scale.engines import Sharding


@dataclass(frozen=True)
class _Seen:
    """What the score sees of one call of the optimizer: views that are made once for the same spans."""

    spans: tuple[int, ...]
    positions: list[int]
    """Of the spans, in the lists of the call."""
    places: list[Tensor]
    """Of the spans, in the arena's `work`."""
    pieces: list[ScoredPiece]
    """Runs of neighbours of one shape: all of a block, unless some of its tensors were frozen."""
    weights: list[Tensor]
    gradients: list[Tensor]


class Scoring:
    """The statistics of one allocator.

    Args:
        score: what is kept and when.
        sharding: where the adapters are.
        arena: this rank's spans in one order.
        final_step: the step of the final allocation.
    """

    def __init__(self, score: Score, sharding: Sharding, arena: Arena, final_step: int) -> None:
        self.score, self._sharding, self._arena, self._final_step = score, sharding, arena, final_step
        self._blocks = [block for block in arena.blocks if block.factor in score.factors]
        self._size = sum(block.size for block in self._blocks)
        self._firsts = first_elements(self._blocks)  # among the statistics
        self.spans = tuple(i for i, span in enumerate(sharding.spans) if span.tensor.factor in score.factors)
        """The spans of the score's factors."""
        self._end = arena.end_of(self.spans)
        self._statistics: dict[str, Tensor] = {}  # name -> (size,)
        self._live = False  # until the final allocation
        self._seen: dict[tuple[int, ...], _Seen] = {}  # by the spans of a call
        self._pieces: list[ScoredPiece] = []
        self._sums: ColumnSums | None = None
        self._waiting: tuple[_Seen, list[Tensor]] | None = None

    @property
    def statistics(self) -> dict[str, list[Tensor]]:
        """The score's statistics by name, one (length,) tensor a span of its factors; none once released."""
        lengths = {i: self._sharding.spans[i].weight.numel() for i in self.spans}
        begins = begins_in(self._blocks, self._firsts)
        return {
            name: [flat[begins.get(i, 0) : begins.get(i, 0) + length] for i, length in lengths.items()]
            for name, flat in self._statistics.items()
        }

    def begin(self) -> None:
        """Set every statistic to zero."""
        self.release()
        zeros = torch.zeros(self._size, dtype=torch.float32, device=self._arena.device)
        self._statistics = {name: zeros.clone() for name in self.score.statistics}
        self._live = True
        self._pieces = [self._piece(b, begin, b.size) for b, begin in zip(self._blocks, self._firsts, strict=True)]

    def release(self) -> None:
        """Give the statistics' memory back: nothing is allocated any more."""
        self._statistics, self._pieces, self._waiting, self._live = {}, [], None, False
        self._seen.clear()

    def see(
        self, indices: list[int], gradients: list[Tensor], scale: Tensor | float, *, penalised: bool, step: int
    ) -> None:
        """Show the gradients of a call of the optimizer, before its update; called with and without the penalty.

        Args:
            indices: spans that the call updates; the arena's `weights` holds theirs.
            gradients: their gradients.
            scale: factor the gradients carry (a GradScaler's).
            penalised: whether the penalty's gradient has been added to them.
            step: the step in progress.
        """
        if penalised != self.score.sees_penalty or not (self._live and self.score.statistics):
            return
        if step >= self._final_step and not self.score.observes_final_step:
            return
        self._arena.weights.open(self._end)
        self._arena.work.open(self._end)
        seen = self._seen_by(tuple(indices))
        if not seen.positions:
            return
        torch._foreach_copy_(seen.places, [gradients[i] for i in seen.positions])
        if self.score.after_update:  # a copy: the arena is used for other things until then
            self._waiting = seen, list(torch._foreach_div(seen.gradients, scale))
        else:
            self.score.observe(seen.pieces, seen.weights, seen.gradients, scale)

    def updated(self) -> None:
        """Observe what was waiting for the update of the call in progress."""
        if self._waiting is not None:
            seen, gradients = self._waiting
            self._arena.read_weights(seen.spans)
            self.score.observe(seen.pieces, seen.weights, gradients, 1.0)
            self._waiting = None

    def scores(self, matrices: int, r: int) -> Tensor:
        """Return S_k of every triplet over all spans of all ranks; one all-reduce.

        Args:
            matrices: adapted matrices.
            r: triplets of each.

        Returns:
            (matrices · r,) float32, ordered by (matrix, k).
        """
        if self._sums is None:
            self._sums = ColumnSums(self._arena, self._blocks, matrices, r)
        self._arena.read_weights(self.spans)
        flat = self._arena.weights.flat
        weights = [flat[block.offset : block.offset + block.size] for block in self._blocks]
        out = self._sums.of(self.score.contributions(self._pieces, weights))
        self._sharding.all_reduce(out)
        return out

    def _piece(self, block: Block, begin: int, size: int) -> ScoredPiece:
        part = {name: flat[begin : begin + size] for name, flat in self._statistics.items()}
        return ScoredPiece(block.factor, block.rows, part)

    def _seen_by(self, indices: tuple[int, ...]) -> _Seen:
        if indices not in self._seen:
            if len(self._seen) > 100:  # of calls before adapters were frozen, or thawed
                self._seen.clear()
            self._seen[indices] = self._make_seen(indices)
        return self._seen[indices]

    def _make_seen(self, indices: tuple[int, ...]) -> _Seen:
        position = {index: number for number, index in enumerate(indices)}
        work, weights = self._arena.work.flat, self._arena.weights.flat
        spans: list[int] = []
        pieces, runs = [], []
        for block, begin in zip(self._blocks, self._firsts, strict=True):
            run = 0  # members of the run that ends here
            for number in range(len(block.members) + 1):
                if number < len(block.members) and block.members[number] in position:
                    spans.append(block.members[number])
                    run += 1
                elif run:
                    first = (number - run) * block.length
                    pieces.append(self._piece(block, begin + first, run * block.length))
                    runs.append(slice(block.offset + first, block.offset + first + run * block.length))
                    run = 0
        return _Seen(
            spans=tuple(spans),
            positions=[position[index] for index in spans],
            places=[self._arena.work_views[index] for index in spans],
            pieces=pieces,
            weights=[weights[run] for run in runs],
            gradients=[work[run] for run in runs],
        )

    # ---- state --------------------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        """Name what `state` holds before the final allocation."""
        names = [self._sharding.spans[index].tensor.name for index in self.spans]
        return [f"{statistic}.{name}" for name in names for statistic in self.score.statistics]

    def state(self) -> dict[str, Tensor]:
        """Return copies of the statistics, named `<statistic>.<module>.<factor>`; nothing once released."""
        return {
            f"{name}.{self._sharding.spans[index].tensor.name}": value.clone()
            for name, values in self.statistics.items()
            for index, value in zip(self.spans, values, strict=True)
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state()`, wherever its tensors are."""
        self.begin()
        for name, values in self.statistics.items():
            for index, value in zip(self.spans, values, strict=True):
                value.copy_(state[f"{name}.{self._sharding.spans[index].tensor.name}"])
