"""Digests of a base model that an adapter file records: they tell bases apart whose shapes agree.

Unlike `fingerprint`, which compares ranks of one run, they do not depend on the dtype the base was loaded in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_SAMPLES = 8
# A digest in a dtype is comparable only where rounding to it loses nothing that another loading kept.
_CASTS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ROUNDS_TO = {
    torch.float64: tuple(_CASTS),
    torch.float32: tuple(_CASTS),
    torch.bfloat16: ("bfloat16",),
    torch.float16: ("float16",),
}


def sample_positions(numel: int) -> list[int]:
    """Return up to 8 positions spread evenly over a tensor of `numel` elements."""
    count = min(_SAMPLES, numel)
    return [index * (numel - 1) // max(count - 1, 1) for index in range(count)]


@dataclass
class WeightsDigest:
    """A digest of a set of weights that does not depend on the dtype they were loaded in.

    A base kept in bfloat16 and the same base loaded in float32 agree on the digest in bfloat16, so that is what is
    compared; a base loaded in float32 also has one in float32, which two float32 loadings compare.
    """

    _tensors: list[tuple[str, tuple[int, ...], Tensor]] = field(default_factory=list)
    _readable: bool = True

    def add(self, name: str, shape: Sequence[int], samples: Tensor | None) -> None:
        """Add one weight.

        Args:
            name: its name in the model.
            shape: its whole shape.
            samples: its elements at `sample_positions`, in the dtype it has; None where they cannot be read.
        """
        if samples is None or samples.dtype not in _ROUNDS_TO:
            self._readable = False
        else:
            self._tensors.append((name, tuple(shape), samples.detach().cpu()))

    def result(self) -> dict[str, str]:
        """Return ``{dtype: digest}``; empty when there is nothing to compare."""
        if not self._readable or not self._tensors:
            return {}
        common = [c for c in _CASTS if all(c in _ROUNDS_TO[samples.dtype] for _, _, samples in self._tensors)]
        digests = {}
        for cast in common:
            digest = hashlib.sha256()
            for name, shape, samples in sorted(self._tensors, key=lambda entry: entry[0]):
                digest.update(f"{name} {shape} {samples.to(_CASTS[cast]).tolist()}".encode())
            digests[cast] = digest.hexdigest()[:16]
        return digests


def tensor_samples(tensor: Tensor) -> Tensor | None:
    """Return a plain tensor's elements at `sample_positions`; None for sharded, quantised and meta tensors."""
    plain = type(tensor) in (Tensor, torch.nn.Parameter) and not hasattr(tensor, "ds_id")
    if not plain or tensor.device.type == "meta" or tensor.dtype not in _ROUNDS_TO:
        return None
    flat = tensor.detach().reshape(-1)
    return flat[torch.tensor(sample_positions(flat.numel()), dtype=torch.long, device=flat.device)]


def same_base(recorded: dict[str, dict[str, str]], own: dict[str, dict[str, str]]) -> bool:
    """Return whether every part of two bases agrees in some dtype that both can be compared in.

    A float32 base and its bfloat16 copy agree in bfloat16 alone, also when the copy is loaded in float32. Parts that
    cannot be compared pass.
    """
    for part, digests in recorded.items():
        common = digests.keys() & own.get(part, {}).keys()
        if common and all(digests[cast] != own[part][cast] for cast in common):
            return False
    return True
