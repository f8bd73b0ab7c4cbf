"""What the code of a rank asks torch for, counted, where tensors have shapes and no values (the meta device).

A read of a value is answered as a sound step would answer it: everything is finite, equal and kept. A collective of
tensors without values is counted and not carried out; objects that ranks exchange go through the pretended group, which
gives every other rank this rank's.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._C._distributed_c10d import FakeWork
from torch.utils._pytree import tree_leaves

from adalora_scale.cluster.plan.trace import LiveBytes

_aten, _c10d = torch.ops.aten, torch.ops.c10d
_TO_HOST = (_aten._to_copy.default, _aten._local_scalar_dense.default, _aten.equal.default)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What one phase asked for on one rank."""

    operations: int
    """Everything dispatched, views included; collectives apart."""
    reads: int
    """Times the host would wait for a value."""
    collectives: int
    bytes: int
    """Of the tensors given to collectives, in and out."""
    python_s: float
    """CPU seconds outside torch's operations: those run without a device here and say nothing."""
    peak_bytes: int
    """Most bytes of tensors made in the phase that lived at once; views of what was there before cost nothing."""


class Counted(LiveBytes):
    """Counts while it is entered, for one phase; it may be entered several times."""

    def __init__(self) -> None:
        super().__init__([])
        self._operations = self._reads = self._collectives = self._bytes = 0
        self._seconds = self._begun = 0.0

    def __enter__(self) -> Counted:
        self._resizing = mock.patch.object(
            torch.UntypedStorage, "resize_", self._noticing(torch.UntypedStorage.resize_)
        )
        self._resizing.start()
        super().__enter__()
        self._begun = time.thread_time()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._seconds += time.thread_time() - self._begun
        super().__exit__(*problem)
        self._resizing.stop()

    def _noticing(self, resize: Any) -> Any:
        def resize_(storage: torch.UntypedStorage, size: int) -> None:
            resize(storage, size)
            self.resized(storage)

        return resize_

    def counts(self) -> Counts:
        """Return what was counted."""
        return Counts(
            operations=self._operations,
            reads=self._reads,
            collectives=self._collectives,
            bytes=self._bytes,
            python_s=self._seconds,
            peak_bytes=self.peak,
        )

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        begun = time.thread_time()
        result = self._answer(function, args, kwargs or {})
        if not getattr(function, "is_view", False):
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._watch(leaf.untyped_storage())
        self._seconds -= time.thread_time() - begun
        return result

    def _answer(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if function.namespace == "c10d":
            return self._collective(function, args, kwargs)
        self._operations += 1
        if function in _TO_HOST and isinstance(args[0], Tensor) and args[0].is_meta:
            return self._read(function, args[0], kwargs)
        self._reads += function in _TO_HOST[1:]
        return function(*args, **kwargs)

    def _read(self, function: Any, tensor: Tensor, kwargs: dict[str, Any]) -> Any:
        """Answer with ones: finite, true, equal."""
        if function is not _TO_HOST[0]:
            self._reads += 1
            return True if function is _aten.equal.default else torch.ones((), dtype=tensor.dtype).item()
        device = kwargs.get("device")
        if device is None or torch.device(device).type == "meta":
            return function(tensor, **kwargs)
        self._reads += 1
        return torch.ones(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype, device=device)

    def _collective(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._collectives += 1
        self._bytes += sum(tensor.nbytes for tensor in tensors)
        if not any(tensor.is_meta for tensor in tensors):
            return function(*args, **kwargs)
        work = FakeWork().boxed()
        return work if len(function._schema.returns) == 1 else (args[0], work)
