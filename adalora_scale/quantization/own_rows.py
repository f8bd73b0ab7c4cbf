"""The rows of a parameter that this rank keeps, and vectors of which ranks keep consecutive parts."""

from __future__ import annotations

from typing import cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from adalora_scale.errors import Unsupported


def own_rows(tensor: Tensor, name: str) -> tuple[Tensor, int, int, dist.ProcessGroup | None]:
    """Return (local tensor, first row, row after the last, the ranks that hold the other rows).

    Raises:
        Unsupported: the tensor is sharded otherwise than by rows.
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach(), 0, tensor.shape[0] if tensor.dim() else 0, None
    sharded = [index for index, placement in enumerate(tensor.placements) if not isinstance(placement, Replicate)]
    if len(sharded) > 1 or any(type(tensor.placements[i]) is not Shard or tensor.placements[i].dim for i in sharded):  # type: ignore[attr-defined]
        raise Unsupported(f"'{name}' is placed as {tensor.placements}; only row shards, Shard(0), can be streamed.")
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    group = tensor.device_mesh.get_group(sharded[0]) if sharded else None
    return cast(DTensor, tensor.detach()).to_local(), offset[0], offset[0] + shape[0], group


def gathered(part: Tensor, rows: int, group: dist.ProcessGroup | None) -> Tensor:
    """Return the whole (rows,) vector of which `group`'s ranks hold consecutive parts, as Shard(0) cuts them."""
    if group is None or dist.get_world_size(group) == 1:
        return part
    ranks = dist.get_world_size(group)
    chunk = -(-rows // ranks)  # all but the last ranks' parts have this length
    padded = part.new_zeros(chunk)
    padded[: part.numel()] = part
    everything = part.new_empty(ranks * chunk)
    dist.all_gather_into_tensor(everything, padded, group=group)
    return everything[:rows]
