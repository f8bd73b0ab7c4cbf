"""A projection of a layer's experts whose weights are kept in 4 bits."""

from __future__ import annotations

from adalora_scale.adalora.adaptables.experts import ExpertProjection
from adalora_scale.quantization.experts import ExpertLinear4bit


class QuantisedExpertProjection(ExpertProjection):
    """As over 16-bit experts: the update reads the layer's settings only, never its weights."""

    types = (ExpertLinear4bit,)  # type: ignore[assignment]  # it has all that ExpertProjection asks an ExpertLinear
