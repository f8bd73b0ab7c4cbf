"""A short digest that tells base models apart without reading them whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

LEADING = 8
"""Elements of every weight that are looked at."""


@dataclass(frozen=True)
class WeightSample:
    """What the digest sees of one weight."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    leading: list[float]
    """Its first elements; empty where they cannot be seen alike on every rank."""


def sample(name: str, weight: Tensor) -> WeightSample:
    """Look at a weight in memory."""
    # Sharded tensors differ between ranks by their nature; meta tensors have no elements to look at.
    visible = type(weight) is Tensor and weight.device.type != "meta" and weight.numel()
    leading = weight.detach().reshape(-1)[:LEADING].tolist() if visible else []
    return WeightSample(name, tuple(weight.shape), str(weight.dtype), leading)


def fingerprint(samples: Sequence[WeightSample]) -> str:
    """Return a short digest of names, shapes, dtypes and the first elements."""
    digest = hashlib.sha256()
    for weight in samples:
        digest.update(f"{weight.name} {weight.shape} {weight.dtype}".encode())
        if weight.leading:
            digest.update(str(weight.leading).encode())
    return digest.hexdigest()[:16]
