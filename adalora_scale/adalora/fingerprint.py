"""A short digest that tells base models apart without reading them whole."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from torch import Tensor


def fingerprint(tensors: Sequence[tuple[str, Tensor]]) -> str:
    """Return a short digest of names, shapes, dtypes and the first elements: tells base models apart, reads little."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        # Sharded tensors differ between ranks by their nature; meta tensors have no elements to look at.
        if type(tensor) is Tensor and tensor.device.type != "meta" and tensor.numel():
            digest.update(str(tensor.detach().reshape(-1)[:8].tolist()).encode())
    return digest.hexdigest()[:16]
