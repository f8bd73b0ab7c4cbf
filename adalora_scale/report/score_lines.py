"""`scores.jsonl`: every triplet's score at an allocation, as it was decided on.

The first line names the matrices, each further one is an allocation:

    {"step": 0, "format": 1, "score": …, "unit": "params" | "triplets", "r": r, "every": n, "modules": [name, …],
     "sides": [[in_features, out_features], …]}
    {"step": …, "budget": …, "spent": …, "gap": …, "scores": base64, "kept": base64}

`scores` are little-endian float32 values, ordered by (matrix, k), bit for bit those that were ranked; `kept` is one bit
a triplet in the same order, the first in the highest bit.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any

import numpy as np
from numpy.typing import NDArray

from adalora_scale.errors import UserError

FORMAT = 1
_MOST_LINES = 64
_MOST_BYTES = 4 * 2**20


def every_nth(allocations: int, triplets: int) -> int:
    """Return which allocations are recorded, so that the file stays small: each n-th, and the final one.

    Args:
        allocations: of the whole run.
        triplets: of the whole model.

    Returns:
        n ≥ 1; at most 64 lines and some 4 MiB come of it.
    """
    a_line = triplets * 6 + 200
    lines = max(1, min(_MOST_LINES, _MOST_BYTES // a_line))
    return max(1, -(-allocations // lines))


def encode(scores: NDArray[np.float32], kept: NDArray[np.bool_]) -> dict[str, str]:
    """Return the two texts of an allocation's line.

    Args:
        scores, kept: (triplets,), ordered by (matrix, k).
    """
    return {
        "scores": base64.b64encode(scores.astype("<f4").tobytes()).decode(),
        "kept": base64.b64encode(np.packbits(kept).tobytes()).decode(),
    }


def decode(line: dict[str, Any], triplets: int, source: str) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """Return the (triplets,) scores and the mask of an allocation's line.

    Args:
        line: as `encode` writes it.
        triplets: how many there must be.
        source: what messages call the line.

    Raises:
        UserError: it holds something else.
    """
    try:
        scores = np.frombuffer(base64.b64decode(line["scores"], validate=True), "<f4").astype(np.float32)
        bits = np.frombuffer(base64.b64decode(line["kept"], validate=True), np.uint8)
    except (KeyError, TypeError, ValueError, binascii.Error):
        raise UserError(f"{source} holds no scores; was the file edited?") from None
    if scores.size != triplets or bits.size != -(-triplets // 8):
        raise UserError(f"{source} holds {scores.size} scores where its first line names {triplets} triplets.")
    return scores, np.unpackbits(bits, count=triplets).astype(bool)
