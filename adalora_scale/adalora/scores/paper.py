"""Sensitivity times uncertainty of the whole objective: the gradient has the orthogonality penalty's in it.

Source: arXiv 2303.10512, where the loss of eq. 4 contains the penalty.
"""

from __future__ import annotations

from adalora_scale.adalora.scores.sensitivity_uncertainty import SensitivityUncertainty


class Paper(SensitivityUncertainty):
    """As `sensitivity_uncertainty`, from the gradient with the penalty."""

    sees_penalty = True


SCORE = Paper
