"""Copies of a rank's state in host memory, so that training can change the state while the copies are written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from adalora_scale.checkpoint.flat import Group, flat_tensors, joined


class Staging:
    """Host buffers that are used again at every checkpoint: new pages cost more time than the copy into them.

    They are page-locked where values come from a GPU, which then copies without the processor's help; what a checkpoint
    no longer holds (statistics, after the final allocation) frees its buffer.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(
        self, groups: Mapping[str, Group], names: Mapping[str, Sequence[str]], extras: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return `flat_tensors` of the arguments in this object's buffers; whoever has the last ones must be done.

        The copies are complete when it returns.
        """
        before, self._buffers = self._buffers, {}
        tensors = flat_tensors(groups, names, extras, partial(self._join, before))
        if any(buffer.is_pinned() for buffer in self._buffers.values()):
            torch.cuda.current_stream().synchronize()
        return tensors

    def _join(self, before: Mapping[str, Tensor], key: str, values: Sequence[Tensor]) -> Tensor:
        if len({value.dtype for value in values}) != 1:
            return joined(key, values)
        elements, dtype = sum(value.numel() for value in values), values[0].dtype
        on_gpu = any(value.is_cuda for value in values)
        buffer = before.get(key)
        if buffer is None or (buffer.numel(), buffer.dtype) != (elements, dtype):
            buffer = torch.empty(elements, dtype=dtype, pin_memory=on_gpu)
        self._buffers[key] = buffer
        offset = 0
        for value in values:
            flat = value.detach().reshape(-1)
            buffer[offset : offset + flat.numel()].copy_(flat, non_blocking=on_gpu)
            offset += flat.numel()
        return buffer
