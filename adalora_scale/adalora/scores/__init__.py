"""The scores by name: one file each, found by the file's name, which is the value of `adalora.score`.

To add a score write one file here that binds `SCORE` to a subclass of `adalora_scale.adalora.score.Score`, and its
plain float64 description in `verify/reference.py`.
"""

from __future__ import annotations

from importlib import import_module

from adalora_scale.adalora.score import Score
from adalora_scale.config import SCORES
from adalora_scale.errors import UserError, nearest


def score_named(name: str) -> type[Score]:
    """Return the score of an `adalora.score`, the config's or one written in a checkpoint.

    Raises:
        UserError: there is no such score.
    """
    if name not in SCORES:
        hint = nearest(name, SCORES) or f" Known: {', '.join(SCORES)}."
        raise UserError(f"adalora.score is '{name}'; there is no such score.{hint}")
    score: type[Score] = import_module(f"{__name__}.{name}").SCORE
    return score
