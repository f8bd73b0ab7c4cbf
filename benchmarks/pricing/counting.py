"""Exact counts of what torch is asked to do: operations, reads of single values, collectives, live bytes, kernels."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adalora_scale.controller import RankAllocator

_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
)


FIGURES = ("operations", "views", "reads", "collectives", "bytes")
"""What is counted."""


class Counter(TorchDispatchMode):
    """Counts operations while it is entered; those inside an operation's own kernel are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels = 0
        """Operations that are neither views nor collectives."""
        self.views = 0
        self.reads = 0
        """Times the host waits for values (`item`, `bool`, `equal`, `nonzero`); in `kernels`, too."""
        self.collectives = self.bytes = 0
        """Collectives, and the bytes of the tensors given to them."""

    @property
    def operations(self) -> int:
        """Everything dispatched, views included."""
        return self.kernels + self.views + self.collectives

    def as_dict(self) -> dict[str, int]:
        """Return the figures by name."""
        return {name: getattr(self, name) for name in FIGURES}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "c10d":
            self.collectives += 1
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        elif function.is_view:
            self.views += 1
        else:
            self.kernels += 1
            self.reads += function in _READS
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


def count(action: Callable[[], Any]) -> dict[str, int]:
    """Return what `action` dispatches, autograd's own operations included."""
    with Counter() as counter:
        action()
    return counter.as_dict()


def peak_bytes(action: Callable[[], Any], device: str) -> int:
    """Return the most bytes of tensors that were alive while `action` ran, those of before among them."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    from adalora_scale.cluster.plan.trace import LiveBytes  # it takes seconds to import

    before = {}
    own = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]  # proxies warn when asked
    for tensor in own:
        storage = tensor.untyped_storage()
        before[storage._cdata] = storage.nbytes() if storage.device.type != "meta" else 0
    with LiveBytes(own) as live:
        action()
    return sum(before.values()) + live.peak


def kernels(action: Callable[[], Any]) -> int:
    """Return how many kernels `action` starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events() or [])
