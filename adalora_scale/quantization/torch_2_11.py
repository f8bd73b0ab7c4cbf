"""What torch 2.11 needs to shard bytes with FSDP2.

Its FSDP2 makes every sharded parameter as one that needs gradients, which bytes refuse, and casts every parameter to
the policy's dtype before it is gathered, which loses bytes. From 2.12 on it asks whether they are numbers first
(`FSDPParam._init_sharded_param`, `init_dtype_attrs`). Drop this file with torch 2.11.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


def let_fsdp2_shard_bytes() -> None:
    """Let FSDP2 hold parameters of whole numbers, in this process; does nothing from torch 2.12 on."""
    if torch.__version__ >= "2.12":
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    if isinstance(_fsdp_param.nn, _Nn):
        return
    _fsdp_param.nn = _Nn()  # type: ignore[assignment]
    set_dtypes = _fsdp_param.FSDPParam.init_dtype_attrs

    @functools.wraps(set_dtypes)
    def init_dtype_attrs(self: Any, mp_policy: Any) -> None:
        set_dtypes(self, mp_policy)
        if not self.orig_dtype.is_floating_point:
            self.param_dtype = None

    _fsdp_param.FSDPParam.init_dtype_attrs = init_dtype_attrs  # type: ignore[method-assign]


class _Nn:
    """torch.nn as that one file sees it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(nn, name)

    @staticmethod
    def Parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(data, requires_grad=requires_grad and (data.is_floating_point() or data.is_complex()))
