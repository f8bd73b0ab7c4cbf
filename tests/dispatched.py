"""What the allocator's two hooks dispatch in each optimizer step, counted at torch's dispatcher."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adalora_scale.controller import RankAllocator


class Counter(TorchDispatchMode):
    """Counts operations while it is entered; those inside an operation's own kernel are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        """Operations that are neither views nor collectives."""
        self.views = 0
        self.reads = 0
        """Single numbers read by the host (`item`, `bool`): on CUDA each waits for the device."""
        self.collectives = self.bytes = 0
        """Collectives, and the bytes of the tensors given to them."""

    @property
    def operations(self) -> int:
        """Everything dispatched."""
        return self.kernels + self.views + self.collectives

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.collectives += 1
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        elif function.is_view:
            self.views += 1
        else:
            self.kernels += 1
            self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def hooks_counted() -> Iterator[list[Counter]]:
    """Count in the last element of the list that is given, which the caller appends to before each step."""
    counters: list[Counter] = []

    def counted(hook: Any) -> Any:
        def wrapper(self: Any, optimizer: Any, args: Any, kwargs: Any) -> None:
            with counters[-1]:
                hook(self, optimizer, args, kwargs)

        return wrapper

    with (
        mock.patch.object(RankAllocator, "_before_update", counted(RankAllocator._before_update)),
        mock.patch.object(RankAllocator, "_after_update", counted(RankAllocator._after_update)),
    ):
        yield counters
