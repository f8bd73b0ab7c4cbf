"""What a plan and an engine tell each other: a model's tensors, the parts of a rank's memory, traffic, loading."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

KINDS = (
    "4-bit weights",
    "4-bit scales",
    "4-bit second level",
    "linear weights",
    "embeddings and head",
    "norms and biases",
    "adapters",
    "other trainable",
)
"""What tensors are for; the second level is a buffer on every rank."""
SECOND_LEVEL = KINDS[2]

Moment = Literal["always", "pass", "forward", "loss", "backward", "step", "host"]
SCORE_STATISTICS = "the score's statistics"
GRADIENTS_COME_LAST = "as activations go, gradients come"


@dataclass(frozen=True)
class Piece:
    """One parameter or persistent buffer."""

    kind: str
    tensor: Tensor
    block: int | None
    """Index of its transformer block; None outside."""

    @property
    def bytes(self) -> int:
        """Size of the whole tensor."""
        return self.tensor.numel() * self.tensor.element_size()

    @property
    def trained(self) -> bool:
        """Whether the optimizer holds it."""
        return self.kind in ("adapters", "other trainable")


@dataclass(frozen=True)
class Part:
    """One named share of memory."""

    name: str
    bytes: int
    moment: Moment = "always"
    """When it is there; `pass` is the whole forward and backward, `host` is not on the device."""
    note: str = ""


@dataclass(frozen=True)
class Weights:
    """What the model's tensors take on the fullest rank (rank 0)."""

    local: dict[str, int]
    """Bytes by kind, in the dtype that stays between steps."""
    trainable: int
    """Elements of all trainable tensors."""
    local_trainable: int
    """Elements this rank owns, padding included."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an engine is asked about: a model, the ranks, and how a step is made."""

    held: list[Piece]
    """The model's tensors."""
    blocks: int
    """Transformer blocks."""
    hidden: int
    """Width of the model."""
    ranks: int
    accumulation: int
    """Micro-batches an optimizer step."""
    bf16: bool
    fp16: bool
    gram: int
    """Bytes of all Gram matrices, which one all-reduce sums for the orthogonality gradient; 0 without a penalty."""
    remembered: float
    """Bytes that the score keeps for each trained element, on average."""
    sharded: Weights | None = None
    """What the engine's `sharder` made of the real model; None takes the engine's rule instead, for a search."""


@dataclass(frozen=True)
class Traffic:
    """Bytes a rank sends."""

    gathered: int
    """Of weights, a micro-batch."""
    reduced: int
    """Of gradients, a micro-batch."""
    once: int
    """Of gradients, once a step."""


@dataclass(frozen=True)
class Reading:
    """How the base comes from its files."""

    read: int
    """Bytes that a node reads."""
    each: int
    """Bytes in the host's memory, for each process that reads."""
    readers: int
    """Processes of a node that read."""


def statistics_part(work: Work, owned: int, moment: Moment = "always") -> Part:
    """Return what the score remembers on a rank that owns so many trained elements."""
    return Part(SCORE_STATISTICS, round(work.remembered * owned), moment, "until the final allocation")


def trained_elements(held: list[Piece]) -> int:
    """Return the elements of all trainable tensors."""
    return sum(piece.tensor.numel() for piece in held if piece.trained)


def around(ranks: int) -> float:
    """Return the share of a message that a ring moves through each of its ranks."""
    return (ranks - 1) / ranks
