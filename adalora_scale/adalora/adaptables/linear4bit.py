"""A linear layer whose weight is kept in 4 bits."""

from __future__ import annotations

from adalora_scale.adalora.adaptables.linear import Matrix
from adalora_scale.quantization.linear import Linear4bit


class QuantisedLinear(Matrix[Linear4bit]):
    """The stored bytes are of (out, in); the checkpoint they were made from may have held (in, out)."""

    types = (Linear4bit,)

    def sides(self, base: Linear4bit) -> tuple[int, int]:
        return base.in_features, base.out_features

    def is_transposed(self, base: Linear4bit) -> bool:
        return base.transposed
