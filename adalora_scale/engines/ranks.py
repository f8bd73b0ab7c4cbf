"""Whether this process is one of several, which, where they exchange tensors, and how they fail together."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from adalora_scale.errors import Unsupported, UserError, WrongEnd

T = TypeVar("T")
E = TypeVar("E", bound=Exception)


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


def together(action: Callable[[], T]) -> T:
    """Run `action` on this rank, and raise on all ranks what it raised on one; a collective call.

    Else the others would wait for the failed one in their next collective, until the group's timeout. Calls may be
    nested: a rank that fails tells the others where it meets them next, and an `action` with collectives of its own
    lets `together` stand right before each of them.

    Raises:
        UserError, Unsupported: as `action`, with the rank's number unless all ranks say the same. An OSError becomes a
            UserError.
        RuntimeError: another rank failed with another error, which that rank raises itself.
    """
    held: list[T] = []
    everywhere(lambda: held.append(action()))
    return held[0]


def everywhere(action: Callable[[], Any]) -> list[Any]:
    """Do as `together`, and return what `action` returned on every rank.

    One small all-reduce tells whether any rank failed or has something to say; objects are gathered only then: a gather
    costs every rank a message, and Python, from each of the others.
    """
    world_size = rank_and_size()[1]
    value: Any = None
    problem: Exception | None = None
    try:
        value = action()
    except Exception as error:  # whatever it is, the others are waiting
        if getattr(error, "on_all_ranks", False):
            raise
        problem = error
    if not _largest([int(problem is not None or value is not None)])[0]:
        return [None] * world_size
    everyone: list[tuple[Any, tuple[type[Exception], str] | None]] = [(value, _told(problem))]
    if world_size > 1:
        everyone = [(None, None)] * world_size
        dist.all_gather_object(everyone, (value if problem is None else None, _told(problem)))
    told = [(number, said) for number, (_, said) in enumerate(everyone) if said is not None]
    if told:
        number, (kind, message) = told[0]
        own = _told(problem)
        if problem is not None and own is not None and own[0] is RuntimeError:
            raise on_all_ranks(problem)
        same = len(told) == world_size and all(said == told[0][1] for _, said in told)
        raised = kind(message if same else f"{message} (rank {number})")
        raise on_all_ranks(raised) from problem
    return [value for value, _ in everyone]


def agreed(digest: bytes | None) -> bool:
    """Return whether all ranks that have a digest have the same; a collective call.

    The bytes that travel, and the work, are the same for any number of ranks.

    Args:
        digest: 32 bytes, such as SHA-256's; None: this rank has nothing to compare.
    """
    words = [int.from_bytes((digest or b"")[begin : begin + 4]) for begin in range(0, 32, 4)]
    both = [*words, *(-word for word in words)] if digest is not None else [-(2**40)] * 16
    largest = _largest(both)
    return largest[0] == -(2**40) or largest[:8] == [-word for word in largest[8:]]


def _largest(numbers: list[int]) -> list[int]:
    """Return the largest of all ranks' numbers, each by itself; a collective call."""
    if not several_ranks():
        return numbers
    values = torch.tensor(numbers, dtype=torch.int64, device=collective_device())
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return [int(value) for value in values.tolist()]


def on_all_ranks(error: E) -> E:
    """Mark an error that every rank raises at this place: an outer `together` lets it pass."""
    error.on_all_ranks = True  # type: ignore[attr-defined]
    return error


def _told(problem: Exception | None) -> tuple[type[Exception], str] | None:
    if problem is None:
        return None
    if isinstance(problem, OSError):
        where = f"{problem.filename}: " if problem.filename is not None else ""
        return UserError, f"{where}{problem.strerror or problem}"
    if isinstance(problem, UserError | Unsupported | WrongEnd):
        return type(problem), str(problem)
    return RuntimeError, f"{type(problem).__name__}: {problem}"
