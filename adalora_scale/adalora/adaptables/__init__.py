"""The types of base layers that AdaLoRA can adapt, a file each; a new one is that file and a line in `ADAPTABLES`."""

from __future__ import annotations

from typing import Any

from torch import nn

from adalora_scale.adalora.adaptables.base import FACTORS, MATRIX, Adaptable, FileForm, block
from adalora_scale.adalora.adaptables.conv1d import TransposedLinear
from adalora_scale.adalora.adaptables.convolution import Convolution
from adalora_scale.adalora.adaptables.embedding import Embedding
from adalora_scale.adalora.adaptables.experts import ExpertProjection
from adalora_scale.adalora.adaptables.experts4bit import QuantisedExpertProjection
from adalora_scale.adalora.adaptables.linear import Linear
from adalora_scale.adalora.adaptables.linear4bit import QuantisedLinear
from adalora_scale.errors import Unsupported

__all__ = [
    "ADAPTABLES",
    "FACTORS",
    "MATRIX",
    "Adaptable",
    "FileForm",
    "adaptable_of",
    "adaptable_or_none",
    "block",
    "is_linear",
    "module_of_factor",
    "namings",
    "sides",
]

ADAPTABLES: tuple[Adaptable[Any], ...] = (
    Linear(), TransposedLinear(), QuantisedLinear(), ExpertProjection(), QuantisedExpertProjection(), Convolution(),
    Embedding(),
)  # fmt: skip


def namings() -> tuple[FileForm, ...]:
    """Return the ways in which factors are named in files."""
    return tuple(dict.fromkeys(adaptable.naming for adaptable in ADAPTABLES))


def module_of_factor(name: str, method: str) -> str | None:
    """Return the module whose factor a file's tensor is; None for other tensors.

    Args:
        name: of the tensor, in the model.
        method: PEFT's name of the file's method, "ADALORA" or "LORA".
    """
    factors = {factor for naming in namings() for factor in naming.names(method)}
    return next((name.removesuffix("." + factor) for factor in factors if name.endswith("." + factor)), None)


def adaptable_of(module: nn.Module) -> Adaptable[Any]:
    """Return what handles a base layer.

    Raises:
        Unsupported: nothing does.
    """
    if (found := adaptable_or_none(module)) is not None:
        return found
    *known, last = (kind.__name__ for adaptable in ADAPTABLES for kind in adaptable.types)
    raise Unsupported(
        f"cannot adapt a {type(module).__module__}.{type(module).__name__}; AdaLoRA layers wrap {', '.join(known)} and "
        f"{last}. Exclude it with adalora.exclude_modules."
    )


def sides(module: nn.Module) -> tuple[int, int]:
    """Return (rows of A, rows of B) of a base layer.

    Raises:
        Unsupported: it cannot be adapted.
    """
    return adaptable_of(module).sides(module)


def is_linear(module: nn.Module) -> bool:
    """Return whether a module is one of those that `all-linear` means."""
    found = adaptable_or_none(module)
    return found is not None and found.linear


def adaptable_or_none(module: nn.Module) -> Adaptable[Any] | None:
    """Return what handles a base layer; None where nothing does."""
    return next((adaptable for adaptable in ADAPTABLES if isinstance(module, adaptable.types)), None)
