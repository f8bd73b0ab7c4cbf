"""Ranks that must agree are asked whether they do: options and base model once, masks and replicas now and then.

A rank that trains on other options, or whose copy of a replicated parameter has drifted (a gradient nobody reduced, a
broken link, a flipped bit), would otherwise show only as a worse model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from adalora_scale.engines import Sharding
from adalora_scale.engines.ranks import agreed, collective_device, everywhere, several_ranks
from adalora_scale.errors import Unsupported, UserError


class RanksDisagree(RuntimeError):
    """Ranks that must hold the same values do not; training on would be wrong."""


def require_equal(values: dict[str, Any]) -> None:
    """Compare plain values over all ranks; a collective call.

    Raises:
        UserError: another rank has another value; the message names the key, the rank and both values.
    """
    # Of all ranks' values only a digest travels: the names of 560 modules from each of 4,096 ranks are 100 MB a rank.
    digest = hashlib.sha256(repr(sorted(values.items())).encode()).digest()
    if agreed(digest):
        return
    everyone = everywhere(lambda: values)
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
        tensors: (name, tensor), equally ordered on all ranks; of any dtype, on any device: only their checksums
            travel, on a device that the group's backend takes.
        step: the optimizer step, for the message.
        group: the ranks that must agree; None means all.

    Raises:
        RanksDisagree: a tensor differs; the message names it, the rank and the step.
    """
    if not tensors or not several_ranks() or dist.get_world_size(group) == 1:
        return
    device = collective_device(group)
    own = torch.stack([checksum(tensor).to(device) for _, tensor in tensors])
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
    for rank, name in enumerate(everywhere(lambda: sharding.probe(write=write))):
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


def checksum(tensor: Tensor, *, chunk: int = 1 << 20) -> Tensor:
    """Return an integer that depends on every bit and its place: ``Σ vₖ (2k + 1) mod 2⁶⁴``, k from 1.

    v are the elements' bits as integers. The factors are odd, so that no change of a single element is lost;
    integer sums do not depend on their order, so every device and every `chunk` give the same.

    Args:
        tensor: of any dtype and layout; its elements (of a complex one the real numbers) count in row-major order.
        chunk: elements read at a time; each takes at most 32 bytes meanwhile.

    Returns:
        () int64 on the tensor's device.
    """
    tensor = tensor.detach().resolve_neg()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    device = tensor.device
    odd = torch.arange(min(chunk, tensor.numel()), dtype=torch.int64, device=device).mul_(2).add_(1)
    total, before = torch.zeros((), dtype=torch.int64, device=device), 0
    for piece in _flat_pieces(tensor, chunk):
        values = piece.view(_BITS[piece.element_size()]).to(torch.int64)
        # A piece's elements stand `before` places further on: Σ v (2 (k + before) + 1) with k from 1.
        total += values.sum() * (2 * (before + 1))
        total += (values * odd[: values.numel()]).sum()
        before += values.numel()
    return total


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Element size → the integers its bits are read as."""


def _flat_pieces(tensor: Tensor, chunk: int) -> Iterator[Tensor]:
    """Yield a tensor's elements in row-major order as contiguous (≤ chunk,) pieces, copying at most one at a time."""
    if tensor.is_contiguous():
        yield from tensor.view(-1).split(chunk)
    elif tensor[0].numel() > chunk:
        for row in tensor:
            yield from _flat_pieces(row, chunk)
    else:
        for rows in tensor.split(chunk // tensor[0].numel()):
            yield rows.reshape(-1).contiguous()  # reshape leaves a lone strided row as it is
