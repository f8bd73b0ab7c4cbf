"""The models a step is measured on; without torch, so that `price.py --help` names them at once."""

from __future__ import annotations

from dataclasses import dataclass

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Shape:
    """A random Llama and the work of a step."""

    hidden: int
    layers: int
    heads: int
    key_value_heads: int
    intermediate: int
    tokens: int
    """A step's, in sequences of `length`."""
    length: int
    r: int
    """Initial rank; half of it is left in the end."""
    vocabulary: int = 2048

    @property
    def matrices(self) -> int:
        """Adapted matrices."""
        return len(TARGETS) * self.layers


SHAPES = {
    "wide": Shape(512, 8, 8, 2, 1792, tokens=512, length=128, r=12),
    "tiny560": Shape(64, 80, 2, 1, 128, tokens=64, length=64, r=8),
    "8b": Shape(4096, 32, 32, 8, 14336, tokens=4096, length=4096, r=16, vocabulary=128256),
    "seconds": Shape(32, 2, 2, 1, 64, tokens=32, length=16, r=4, vocabulary=64),
}
"""Few large matrices, 560 tiny ones, an 8 B on a card; the last is for trying the command out."""
