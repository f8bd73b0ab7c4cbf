"""Whether this process is one of several, which, and where they exchange tensors."""

from __future__ import annotations

import torch
import torch.distributed as dist


def several_ranks() -> bool:
    """Return whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def collective_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Return a device whose tensors the collectives of `group` (None: all ranks) take.

    NCCL has no backend for CPU tensors, which is where CPU offload keeps masters. A group that has several backends
    gives the CPU.

    Source: the choice of torch's own object collectives; `_device_types` is what torch 2.11 to 2.15 ask for it.
    """
    kinds = [device.type for device in (group or dist.group.WORLD)._device_types]  # type: ignore[union-attr]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])
