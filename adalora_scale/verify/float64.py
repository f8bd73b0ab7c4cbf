"""Computing in float64 what code asks for in float32: norms, softmaxes and routers of a model in any dtype."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """While it is open every torch function that is told float32 does the same in float64.

    transformers' families cast to float32 inside (`.float()`, `dtype=torch.float32`) and back, which leaves a model
    that was made float64 a float32's digits. What a function is told in its own arguments counts, in the forward and
    so in its backward; the dtypes of tensors, and what Python code compares them with, are as they are.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        told = {key: _wide(value) for key, value in (kwargs or {}).items()}
        return func(*map(_wide, args), **told)


def _wide(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
