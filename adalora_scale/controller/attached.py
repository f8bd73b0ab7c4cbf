"""What an allocator has once it is attached: an engine's hold of the model, and what works on this rank's spans."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from adalora_scale.adalora.score import Score
from adalora_scale.controller.arena import Arena
from adalora_scale.controller.scoring import Scoring
from adalora_scale.controller.step_sums import StepReduction
from adalora_scale.controller.triplets import Triplets
from adalora_scale.engines import Sharding


@dataclass(frozen=True)
class Attached:
    """The parts, all over one arena."""

    sharding: Sharding
    arena: Arena
    reduction: StepReduction
    scoring: Scoring
    triplets: Triplets

    @classmethod
    def to(cls, sharding: Sharding, score: Score, matrices: int, *, final_step: int) -> Attached:
        """Make the parts.

        Args:
            sharding: where the adapters are; connected.
            score: what is kept of them.
            matrices: adapted matrices of the model.
            final_step: the step of the final allocation.
        """
        arena = Arena(sharding)
        return cls(
            sharding=sharding,
            arena=arena,
            reduction=StepReduction(sharding, arena, matrices, score.config.orth_reg_weight),
            scoring=Scoring(score, sharding, arena, final_step),
            triplets=Triplets(sharding, arena),
        )

    def read_weights(self, *, scoring: bool) -> None:
        """Bring into the arena the weights of before the update that the step in progress needs.

        Args:
            scoring: whether the score still looks.
        """
        needed = self.scoring.spans if scoring and self.scoring.score.statistics else ()
        self.arena.read_weights(tuple(sorted({*needed, *self.reduction.spans})))

    def see(
        self, indices: list[int], gradients: list[Tensor], scale: Tensor | float, *, step: int, scoring: bool
    ) -> None:
        """Show the score a call's gradients, and add the penalty's, in the score's order.

        Args:
            indices: spans that the call updates.
            gradients: their gradients, changed in place by the penalty.
            scale: factor the gradients carry (a GradScaler's).
            step: the step in progress.
            scoring: whether the score still looks.
        """
        if scoring:
            self.scoring.see(indices, gradients, scale, penalised=False, step=step)
        self.reduction.add_penalty_gradient(indices, gradients, scale)
        if scoring:
            self.scoring.see(indices, gradients, scale, penalised=True, step=step)
