"""torch's Conv1d and Conv2d: the matrix is that of the unfolded input, weight.view(out_channels, -1).

A's rows are (in_channels · kernel), so A is itself a convolution with r outputs and the base's stride, padding and
dilation, and B one with a kernel of 1. Source: peft/tuners/lora/layer.py, _ConvNd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from adalora_scale.adalora.adaptables.base import Adaptable, FileForm
from adalora_scale.errors import Unsupported

Convolutional = nn.Conv1d | nn.Conv2d


class Convolution(Adaptable[Convolutional]):
    """A convolution in one group with zero padding, along one or two dimensions."""

    types = (nn.Conv1d, nn.Conv2d)

    def sides(self, base: Convolutional) -> tuple[int, int]:
        if type(base).forward not in (nn.Conv1d.forward, nn.Conv2d.forward):
            raise Unsupported(
                f"cannot adapt a {type(base).__module__}.{type(base).__name__}: its forward is not the convolution's "
                f"own. Exclude it with adalora.exclude_modules."
            )
        for name, needed in (("groups", 1), ("padding_mode", "zeros")):
            if (value := getattr(base, name)) != needed:
                raise Unsupported(
                    f"cannot adapt a {type(base).__name__} with {name}={value!r}; only {name}={needed!r} is supported. "
                    f"Exclude it with adalora.exclude_modules."
                )
        return base.in_channels * math.prod(base.kernel_size), base.out_channels

    def add_update(
        self,
        base: Convolutional,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        e: Tensor,
        b: Tensor,
        dropout: Callable[[Tensor], Tensor],
        *more: Any,
    ) -> Tensor:  # x: (..., in_channels, *sides), y: (..., out_channels, *other sides)
        convolve = F.conv2d if isinstance(base, nn.Conv2d) else F.conv1d
        right, left = self.form(base).stored(a.T, b)
        inner = convolve(dropout(x), right, None, base.stride, base.padding, base.dilation)  # (..., r, *other sides)
        return y + convolve(inner * e.view(-1, *[1] * len(base.kernel_size)), left).to(y.dtype)

    def form(self, base: Convolutional) -> FileForm:
        return FileForm(kernel=tuple(base.kernel_size))

    def why_not_peft(self, base: Convolutional) -> str | None:
        if any(step != 1 for step in base.dilation):  # peft 0.21 leaves it out of its own convolution
            return f"PEFT's LoRA ignores dilation={tuple(base.dilation)}"
        return None
