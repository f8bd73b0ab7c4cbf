"""Sensitivity times uncertainty as PEFT's training loop observes it.

`update_and_allocate` is called after `optimizer.step()`, while the gradients, the penalty's included, are still there.
Its final allocation uses the statistics of the step before, and pruned triplets keep their columns.

Source: peft/tuners/adalora/model.py `update_and_allocate`, peft/tuners/adalora/layer.py `RankAllocator`.
"""

from __future__ import annotations

from adalora_scale.adalora.scores.sensitivity_uncertainty import SensitivityUncertainty


class Peft(SensitivityUncertainty):
    """As `sensitivity_uncertainty`, from the gradient with the penalty and the weight after the update."""

    sees_penalty = True
    after_update = True
    observes_final_step = False
    keeps_columns = True


SCORE = Peft
