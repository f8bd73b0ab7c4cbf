"""The adapted matrices of a model: one of a dense layer, one of every expert of a layer of experts.

They are numbered over the whole model, module by module and expert by expert: triplet k of matrix m is m · r + k.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from adalora_scale.adalora.layer import AdaLoraLayer


def matrix_names(module: str, matrices: int) -> list[str]:
    """Name the matrices of a module.

    Args:
        module: its name.
        matrices: how many it stands for.

    Returns:
        The module's name where it is one matrix; of experts the name with the expert's number before the last part:
        `model.layers.0.mlp.experts.5.gate_up_proj`.
    """
    if matrices == 1:
        return [module]
    parent, dot, leaf = module.rpartition(".")
    return [f"{parent}{dot}{number}.{leaf}" for number in range(matrices)]


def rows_of(mask: Sequence[bool], matrices: int) -> list[Sequence[bool]]:
    """Return what a module's flat mask, matrix by matrix, says of each of its matrices."""
    r = len(mask) // matrices
    return [mask[n * r : (n + 1) * r] for n in range(matrices)]


@dataclass(frozen=True)
class Matrices:
    """The matrices of one model."""

    names: list[str]
    """In the order of their numbers."""
    of_module: dict[str, int]
    """Adapted module → how many it stands for."""

    @classmethod
    def of(cls, layers: Mapping[str, AdaLoraLayer]) -> Matrices:
        """Number the matrices of adapted modules, name → layer."""
        counts = {module: layer.matrices for module, layer in layers.items()}
        return cls([name for module, count in counts.items() for name in matrix_names(module, count)], counts)

    def ranks(self, mask: Tensor) -> dict[str, int]:
        """Return matrix → its kept triplets, of a (matrices · r,) bool mask."""
        return dict(zip(self.names, mask.view(len(self.names), -1).sum(1).tolist(), strict=True))

    def by_module(self, mask: Tensor) -> dict[str, list[bool]]:
        """Return module → its part of a (matrices · r,) bool mask, (its matrices · r,) flat."""
        r = mask.numel() // len(self.names)
        parts = mask.split([count * r for count in self.of_module.values()])
        return {module: part.tolist() for module, part in zip(self.of_module, parts, strict=True)}
