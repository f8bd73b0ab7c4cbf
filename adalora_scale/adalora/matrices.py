"""The matrices of an adapted layer: their names, and where their triplets lie in the layer's factors.

A layer of experts stands for as many matrices as it has experts; every other layer for one. Matrix i's factors are the
i-th of equal parts of the layer's: rows of A and B, a row of E.
"""

from __future__ import annotations

import re
from collections.abc import Container, Sequence

import torch
from torch import Tensor

_NUMBERED = re.compile(r"(?P<before>.+)\.(?P<number>\d+)\.(?P<last>[^.]+)")

Triplets = tuple[Tensor, Tensor, Tensor]
"""A (in, r), E (r,) and B (out, r) of one matrix."""


def matrix_names(module: str, matrices: int) -> list[str]:
    """Return the names of a layer's matrices: the layer's own, or with the expert's number before its last part.

    `model.layers.0.mlp.experts.gate_up_proj` of several experts gives `model.layers.0.mlp.experts.5.gate_up_proj`.
    """
    if matrices == 1:
        return [module]
    before, dot, last = module.rpartition(".")
    return [f"{before}{dot}{number}.{last}" for number in range(matrices)]


def layer_of_matrix(name: str) -> tuple[str, int] | None:
    """Return the layer and the number that `matrix_names` made a name of; None where it has no such form."""
    match = _NUMBERED.fullmatch(name)
    return None if match is None else (f"{match['before']}.{match['last']}", int(match["number"]))


def layer_among(names: Container[str], matrix: str) -> str:
    """Return which of `names` a matrix is of: the one of its own name, or an experts'; its own where it is of none."""
    found = layer_of_matrix(matrix)
    return matrix if matrix in names or found is None or found[0] not in names else found[0]


def parts(a: Tensor, e: Tensor, b: Tensor, matrices: int) -> list[Triplets]:
    """Return views of the triplets of each matrix of a layer.

    Args:
        a, e, b: (matrices · in, r), (matrices, r) or (r,), (matrices · out, r).
        matrices: of the layer.
    """
    r = a.shape[-1]
    each = (
        a.view(matrices, a.shape[0] // matrices, r),
        e.view(matrices, r),
        b.view(matrices, b.shape[0] // matrices, r),
    )
    return list(zip(*(factor.unbind(0) for factor in each), strict=True))


def rows_of(mask: Sequence[bool], matrices: int) -> list[Sequence[bool]]:
    """Return what a module's flat mask, matrix by matrix, says of each of its matrices."""
    r = len(mask) // matrices
    return [mask[n * r : (n + 1) * r] for n in range(matrices)]


def kept_columns(matrices: int, r: int, mask: Sequence[bool] | None) -> list[Tensor]:
    """Return which columns of each matrix's factors hold its kept triplets: (kept,) int64 a matrix.

    Args:
        matrices, r: of the layer, as its factors are now.
        mask: triplets kept by the final allocation, matrix by matrix; None before it: all are. Where it has a place for
            every column the triplets are in their own; else the layer was built at pruned ranks, r being the largest
            of them, and each matrix's triplets take the first columns.
    """
    if mask is None:
        return [torch.arange(r) for _ in range(matrices)]
    kept = torch.tensor(mask, dtype=torch.bool).view(matrices, -1)
    if kept.shape[1] == r:
        return [row.nonzero().flatten() for row in kept]
    return [torch.arange(int(row.sum())) for row in kept]


def stacked(triplets: Sequence[Triplets], r: int, columns: Sequence[Tensor] | None = None) -> Triplets:
    """Return a layer's A (matrices · in, r), E (matrices, r) — (r,) of one — and B: zeros beside the given triplets.

    Args:
        triplets: of each matrix, of any ranks up to r.
        r: columns of the result.
        columns: where each matrix's triplets go; the first ones by default.
    """
    count = len(triplets)
    a, e, b = (torch.zeros(count, *part.shape[:-1], r, dtype=torch.float32) for part in triplets[0])
    for number, three in enumerate(triplets):
        places = torch.arange(three[1].numel()) if columns is None else columns[number]
        for whole, part in zip((a, e, b), three, strict=True):
            whole[number][..., places] = part.float()
    return a.flatten(0, 1), e if count > 1 else e[0], b.flatten(0, 1)
