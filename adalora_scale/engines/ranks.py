"""Whether this process is one of several, which, where they exchange tensors, and failing together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from adalora_scale.errors import Unsupported, UserError

T = TypeVar("T")


def several_ranks() -> bool:
    """Return whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of ranks; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def on_every_rank(action: Callable[[], T]) -> T:
    """Run `action`, which waits for no other rank, on every rank; a collective call.

    An error that only one rank meets would leave the others waiting in their next collective until its timeout.

    Raises:
        UserError, Unsupported: `action` raised it on some rank; the first such rank's is raised on all ranks alike.
    """
    result: T | None = None
    problem: UserError | Unsupported | None = None
    try:
        result = action()
    except (UserError, Unsupported) as error:
        problem = error
    if several_ranks():
        everyone: list[tuple[type[Exception], str] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, None if problem is None else (_kind(problem), str(problem)))
        failed = [(rank, *said) for rank, said in enumerate(everyone) if said is not None]
        if failed:
            rank, kind, message = failed[0]
            raise kind(message if len(failed) > 1 else f"{message} (rank {rank})") from problem
    if problem is not None:
        raise problem
    return result  # type: ignore[return-value]  # without a problem it is there


def _kind(error: UserError | Unsupported) -> type[Exception]:
    return Unsupported if isinstance(error, Unsupported) else UserError


def collective_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Return a device whose tensors the collectives of `group` (None: all ranks) take.

    NCCL has no backend for CPU tensors, which is where CPU offload keeps masters. A group that has several backends
    gives the CPU.

    Source: the choice of torch's own object collectives; `_device_types` is what torch 2.11 to 2.15 ask for it.
    """
    kinds = [device.type for device in (group or dist.group.WORLD)._device_types]  # type: ignore[union-attr]
    return torch.device("cpu" if "cpu" in kinds else kinds[0])
