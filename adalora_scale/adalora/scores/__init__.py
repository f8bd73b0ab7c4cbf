"""The scores by name: one file each, found by the file's name, which is the value of `adalora.preset`.

To add a score write one file here that binds `SCORE` to a subclass of `adalora_scale.adalora.score.Score`, and its
plain float64 description in `verify/reference.py`.
"""

from __future__ import annotations

from importlib import import_module

from adalora_scale.adalora.score import Score
from adalora_scale.config import PRESETS
from adalora_scale.errors import UserError, nearest


def score_named(name: str) -> type[Score]:
    """Return the score of an `adalora.preset`, the config's or one written in a checkpoint.

    Raises:
        UserError: there is no such score.
    """
    if name not in PRESETS:
        hint = nearest(name, PRESETS) or f" Known: {', '.join(PRESETS)}."
        raise UserError(f"adalora.preset is '{name}'; there is no such score.{hint}")
    score: type[Score] = import_module(f"{__name__}.{name}").SCORE
    return score
