"""The adapted matrices of a model, numbered module by module, expert by expert: triplet k of matrix m is m · r + k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.adalora.matrices import matrix_names


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
        bits: list[bool] = mask.tolist()  # at once: each is a wait for the device
        ends = accumulate(count * r for count in self.of_module.values())
        return {
            module: bits[end - count * r : end]
            for (module, count), end in zip(self.of_module.items(), ends, strict=True)
        }
