"""transformers' Conv1D (GPT-2): a linear layer whose weight lies as (in, out)."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adalora_scale.adalora.adaptables.linear import LinearProduct, Matrix, require_linear


class Conv1DProduct(LinearProduct):
    """``x W + bias``."""

    kind = Conv1D

    def multiply(self, base: nn.Module, x: Tensor, frozen: Sequence[Tensor], bias: Tensor | None) -> Tensor:
        return F.linear(x, frozen[0].T, bias)

    def multiply_back(self, base: nn.Module, gradient: Tensor, frozen: Sequence[Tensor]) -> Tensor:
        return gradient @ frozen[0].T


class TransposedLinear(Matrix[Conv1D]):
    """Named a convolution by its authors; it is a matrix product."""

    types = (Conv1D,)
    transposed = True
    product = Conv1DProduct()

    def sides(self, base: Conv1D) -> tuple[int, int]:
        require_linear(base)
        return int(base.nx), int(base.nf)
