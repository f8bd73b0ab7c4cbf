"""transformers' Conv1D (GPT-2): a linear layer whose weight lies as (in, out)."""

from __future__ import annotations

from transformers.pytorch_utils import Conv1D

from adalora_scale.adalora.adaptables.linear import Matrix, require_linear


class TransposedLinear(Matrix[Conv1D]):
    """Named a convolution by its authors; it is a matrix product."""

    types = (Conv1D,)
    transposed = True

    def sides(self, base: Conv1D) -> tuple[int, int]:
        require_linear(base)
        return int(base.nx), int(base.nf)
