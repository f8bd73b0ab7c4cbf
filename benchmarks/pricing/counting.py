"""Exact counts of what torch is asked to do: operations, reads of single values, collectives, live bytes, kernels."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_READS = ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero")
"""What makes a host wait for a device."""


@dataclass
class Counts:
    """What was dispatched while a `Counter` was active; autograd's own operations are in it."""

    operations: int = 0
    """Without views."""
    views: int = 0
    reads: int = 0
    """Times the host waited for a value; in `operations`, too."""
    collectives: int = 0
    collective_bytes: int = 0
    """Of the tensors that collectives were called with."""

    def __sub__(self, other: Counts) -> Counts:
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: value - theirs[name] for name, value in mine.items()})

    def as_dict(self) -> dict[str, int]:
        """Return the figures by name."""
        return asdict(self)


class Counter(TorchDispatchMode):
    """Counts what is dispatched inside."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counts()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        counts = self.counts
        if function.namespace == "c10d":
            counts.collectives += 1
            counts.collective_bytes += sum(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        elif function.is_view:
            counts.views += 1
        else:
            counts.operations += 1
            counts.reads += function.name().split(".")[0] in _READS
        return function(*args, **(kwargs or {}))


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that are alive: those of before, and those made inside; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, int] = {}
        self.now = 0
        for thing in gc.get_objects():
            if issubclass(type(thing), Tensor):  # some proxies warn when they are asked for their class
                self._note(thing)
        self.peak = self.now

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or storage.device.type == "meta":
            return
        self._known[key] = storage.nbytes()
        self.now += storage.nbytes()
        weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key, 0)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        self.peak = max(self.peak, self.now)
        return result


def count(action: Callable[[], Any]) -> Counts:
    """Return what `action` dispatches."""
    with Counter() as counter:
        action()
    return counter.counts


def peak_bytes(action: Callable[[], Any], device: str) -> int:
    """Return the most bytes of tensors that were alive while `action` ran, those of before among them."""
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        action()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated()
    with LiveBytes() as live:
        action()
    return live.peak


def kernels(action: Callable[[], Any]) -> int:
    """Return how many kernels `action` starts on the GPU."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        action()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events() or [])
