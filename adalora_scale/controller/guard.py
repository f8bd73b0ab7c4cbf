"""Ranks that must agree are asked whether they do: options and base model once, masks and replicas now and then.

A rank that trains on other options, or whose copy of a replicated parameter has drifted (a gradient nobody reduced, a
broken link, a flipped bit), would otherwise show only as a worse model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adalora_scale.engines import Sharding
from adalora_scale.engines.ranks import several_ranks
from adalora_scale.errors import Unsupported, UserError


class RanksDisagree(RuntimeError):
    """Ranks that must hold the same values do not; training on would be wrong."""


def require_equal(values: dict[str, Any]) -> None:
    """Compare plain values over all ranks; a collective call.

    Raises:
        UserError: another rank has another value; the message names the key, the rank and both values.
    """
    if not several_ranks():
        return
    everyone: list[dict[str, Any]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, values)
    for rank, other in enumerate(everyone):
        for key, value in everyone[0].items():
            if other.get(key) != value:
                raise UserError(
                    f"rank {rank} has {key} = {other.get(key)!r}, rank 0 has {value!r}; start every rank with the same "
                    f"config and base model."
                )


@torch.no_grad()
def require_same_tensors(
    tensors: Sequence[tuple[str, Tensor]], step: int, group: dist.ProcessGroup | None = None
) -> None:
    """Compare checksums of tensors that every rank of `group` holds whole; a collective call.

    Args:
        tensors: (name, tensor), equally ordered on all ranks; float32, bfloat16, float16 or bool.
        step: the optimizer step, for the message.
        group: the ranks that must agree; None means all.

    Raises:
        RanksDisagree: a tensor differs; the message names it, the rank and the step.
    """
    if not tensors or not several_ranks() or dist.get_world_size(group) == 1:
        return
    own = torch.stack([_checksum(tensor) for _, tensor in tensors])
    everyone = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(everyone, own, group=group)
    for position, other in enumerate(everyone):
        differs = (other != everyone[0]).nonzero()
        if differs.numel():
            name = tensors[int(differs[0, 0])][0]
            ranks = dist.get_process_group_ranks(group or dist.group.WORLD)
            raise RanksDisagree(
                f"step {step}: '{name}' on rank {ranks[position]} differs from rank {ranks[0]}. Its gradient was not "
                f"reduced over ranks (adapters injected after wrapping?) or a device is faulty; go back to the last "
                f"checkpoint."
            )


def require_same_start(tensors: Sequence[tuple[str, Tensor]], group: dist.ProcessGroup | None) -> None:
    """Compare what ranks hold in common before the first step; a collective call.

    Raises:
        UserError: a tensor differs; the message names it and a rank.
    """
    try:
        require_same_tensors(tensors, 0, group)
    except RanksDisagree as error:
        differs = str(error).removeprefix("step 0: ").split(". ")[0]
        raise UserError(
            f"{differs} before the first step; draw adapters with the same seed on every rank (torch.manual_seed "
            f"before inject_adalora, not seed + rank), or load the same adapter."
        ) from None


def require_in_forward(sharding: Sharding, *, write: bool, step: int) -> None:
    """See that the spans are the values that the model's forward computes with, on every rank; a collective call.

    Args:
        sharding: where the adapters are.
        write: also write into the spans and see it arrive (at attach).
        step: the optimizer step; 0 is attach.

    Raises:
        Unsupported: at attach, they are not: an option of the engine moves them where nobody looks.
        RanksDisagree: later, they are not any more.
    """
    everyone = [sharding.probe(write=write)]
    if several_ranks():
        own, everyone = everyone[0], [None] * dist.get_world_size()
        dist.all_gather_object(everyone, own)
    for rank, name in enumerate(everyone):
        if name is not None and step == 0:
            raise Unsupported(
                f"'{name}' on rank {rank}: the forward computes with other values than the optimizer updates. An "
                f"option of the engine moves them where adalora_scale does not look; use fewer options."
            )
        if name is not None:
            raise RanksDisagree(
                f"step {step}: '{name}' on rank {rank}: the forward computes with other values than the optimizer "
                f"updates; something gave the parameter other memory. Go back to the last checkpoint."
            )


def _checksum(tensor: Tensor) -> Tensor:
    """Return an integer that depends on every bit and its place (int64, wrapping)."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    values = tensor.detach().reshape(-1).contiguous().view(bits).to(torch.int64)
    places = torch.arange(1, values.numel() + 1, device=values.device, dtype=torch.int64)
    return (values * (2 * places + 1)).sum()
