"""What AdaLoRA must know of a type of base layer, and the names of an adapter's tensors.

A base layer stands for one matrix, however its weight lies: ΔW = s · B diag(E) Aᵀ has a row for every element of its
output and a column for every element of its input (an embedding's input is a one-hot vector). A layer's experts stand
for as many matrices of equal sides, each with triplets of its own; their factors lie one expert after another.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from adalora_scale.adalora.adapted_product import Product

Base = TypeVar("Base", bound=nn.Module)

FACTORS = ("lora_A", "lora_E", "lora_B")
"""Names of a layer's adapter parameters, in the order every list of adapter tensors follows."""


@dataclass(frozen=True)
class FileForm:
    """How PEFT's files hold one module's update: the names after the module's own, and the shapes.

    A is (r, rows of A) and B (rows of B, r); for convolutions A is (r, channels, *kernel) and B (rows of B, r, 1, …).
    """

    adalora: tuple[str, ...] = FACTORS
    """A, E and B in an AdaLoRA file. PEFT reads no other AdaLoRA form than `MATRIX`."""
    lora: tuple[str, ...] = ("lora_A.weight", "lora_B.weight")
    """A and B in a plain LoRA file."""
    kernel: tuple[int, ...] = ()
    """Sides of a convolution's kernel; empty for a matrix."""

    def names(self, method: str) -> tuple[str, ...]:
        """Return the factors' names in a file of PEFT's method "ADALORA" or "LORA", A first and B last."""
        return self.adalora if method == "ADALORA" else self.lora

    @staticmethod
    def of_record(record: dict[str, Any]) -> FileForm:
        """Return what `dataclasses.asdict` gave, after a way through JSON."""
        return FileForm(**{key: tuple(value) for key, value in record.items()})

    def stored(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """Shape A (r, rows of A) and B (rows of B, r) as the file holds them."""
        channels = a.shape[1] // math.prod(self.kernel)
        ones = [1] * len(self.kernel)
        return a.reshape(a.shape[0], channels, *self.kernel).contiguous(), b.reshape(*b.shape, *ones).contiguous()


MATRIX = FileForm()
"""The form of linear layers."""


class Adaptable(ABC, Generic[Base]):
    """A type of base layer that an adapter can be put on; it has no state.

    Sides, kernels and settings are read from the base layer's attributes, never from its weight's shape: under ZeRO-3 a
    partitioned weight has shape (0,).
    """

    types: ClassVar[tuple[type[nn.Module], ...]]
    """Classes of base layers, subclasses included."""
    linear: ClassVar[bool] = False
    """Whether `all-linear` selects it and `Coverage` counts it."""
    naming: ClassVar[FileForm] = MATRIX
    """Names of the factors in files; `form` adds the kernel."""
    transposed: ClassVar[bool] = False
    """Whether a checkpoint holds the weight with the input first: (rows of A, rows of B)."""
    product: ClassVar[Product | None] = None
    """How the layer multiplies, where an update can be computed in one function with it."""

    def matrices(self, base: Base) -> int:
        """Return how many matrices the layer stands for."""
        return 1

    @abstractmethod
    def sides(self, base: Base) -> tuple[int, int]:
        """Return (rows of A, rows of B) of one matrix: the sizes of its input and of its output.

        Raises:
            Unsupported: the layer has a setting under which an update would be wrong.
        """

    @abstractmethod
    def add_update(
        self,
        base: Base,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        e: Tensor,
        b: Tensor,
        dropout: Callable[[Tensor], Tensor],
        *more: Any,
    ) -> Tensor:
        """Return y with what the adapter adds to it, in y's dtype.

        Args:
            base: the layer; only its settings are read.
            y: its output, ``base(x, *more)``.
            x: its input.
            a, e, b: A (rows of A, r), s · E (r,) and B (rows of B, r), in the dtype to compute in; of several matrices
                A (matrices · rows of A, r), s · E (matrices, r) and B (matrices · rows of B, r).
            dropout: drops elements of the adapter's input.
            more: what the layer is called with beside x.
        """

    def form(self, base: Base) -> FileForm:
        """Return how PEFT's files hold the layer's update."""
        return self.naming

    def is_transposed(self, base: Base) -> bool:
        """Return whether a checkpoint holds this layer's weight with the input first."""
        return self.transposed

    def still_rows(self, base: Base) -> list[int]:
        """Return rows of A that are zero at the start and never get a gradient (a padding token's)."""
        return []

    def fan_in(self, base: Base) -> int:
        """Return how many numbers of the input a row of the output is a sum over."""
        return self.sides(base)[0]

    def why_not_peft(self, base: Base) -> str | None:
        """Say why PEFT's LoRA would compute something else for this layer; None where it does the same."""
        return None


def block(a: Tensor, e: Tensor, b: Tensor, start: int, stop: int, *, transposed: bool) -> Tensor:
    """Return entries [start, stop) of the first dimension of ΔW = B diag(e) A, the rest of it flat.

    Args:
        a, e, b: A (r, rows of A), λ with the scaling (r,), B (rows of B, r).
        start, stop: which rows of B; of A when transposed.
        transposed: the weight lies with the input first.
    """
    if transposed:
        return (a[:, start:stop].T * e) @ b.T
    return (b[start:stop] * e) @ a
