"""Whole parameters, whoever holds the pieces."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from adalora_scale.engines.probing import same_values
from adalora_scale.engines.ranks import collective_device
from adalora_scale.engines.zero_layouts import gathered_as_forward, layout_of, overlap
from adalora_scale.errors import Unsupported


def settle(model: nn.Module) -> None:
    """Put what an evaluation left gathered, whole or on a smaller mesh, back to the parameters that are trained.

    Where FSDP2 holds a model, call it before looking at its parameters; elsewhere nothing happens.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def full_parameter(parameter: nn.Parameter, model: nn.Module) -> Tensor:
    """Return the whole value of a parameter of `model`: the fp32 master where an engine keeps one.

    A collective call where the parameter is sharded: every rank calls it for the same parameters in the same order.

    Raises:
        Unsupported: the masters of a DeepSpeed optimizer are not the values that the forward computes with.
    """
    if isinstance(parameter, DTensor):
        # FSDP2's CPU offload keeps shards on the host, where NCCL cannot gather.
        whole: Tensor = parameter.to(parameter.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
        return whole
    partitioned = hasattr(parameter, "ds_id")
    if not partitioned and not hasattr(parameter, "_dp_group"):
        return parameter.detach()
    if not parameter.requires_grad:
        return gathered_as_forward([parameter])[0] if partitioned else parameter.detach()
    return _from_masters(parameter, model)


def held_values(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a parameter or buffer, wherever its engine keeps it; no collective, no copy."""
    partition = getattr(tensor, "ds_tensor", None)  # ZeRO-3; the last partitions are padded with what was in memory
    if isinstance(partition, Tensor):
        start = dist.get_rank(group=tensor.ds_process_group) * partition.ds_numel  # type: ignore[attr-defined]
        return partition.detach().view(-1)[: max(0, tensor.ds_numel - start)]  # type: ignore[attr-defined]
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def _from_masters(parameter: Any, model: nn.Module) -> Tensor:
    """Put the ranks' pieces of a ZeRO optimizer's masters together, and see that the forward computes with them."""
    if hasattr(parameter, "ds_id"):
        group, shape = parameter.ds_process_group, parameter.ds_shape
        computed = gathered_as_forward([parameter])[0]
        start, piece = _partitioned_piece(parameter)
    else:
        group, shape, computed = parameter._dp_group, parameter.shape, parameter.detach()
        start, piece = _flat_piece(parameter, model)
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=collective_device(group))
    whole[start : start + piece.numel()] = piece
    dist.all_reduce(whole, group=group)
    if not same_values(whole, computed.reshape(-1)):
        raise Unsupported(
            "DeepSpeed's master weights are not the values that the forward computes with; an option of its "
            "configuration moves them where adalora_scale does not look. Nothing was saved."
        )
    return whole.view(shape)


def _partitioned_piece(parameter: Any) -> tuple[int, Tensor]:
    """Return where this rank's piece of a parameter under ZeRO-3 starts, and its master weights."""
    layout = layout_of(parameter._z3_optimizer)
    group, offset, start, length = layout.place("a trained parameter", parameter)
    return start, layout.masters()[group].detach()[offset : offset + length]


def _flat_piece(parameter: Any, model: nn.Module) -> tuple[int, Tensor]:
    """Return the same under ZeRO-1 and 2, whose optimizer cannot be reached from a parameter.

    The low-precision parameters of a group are views of one flat tensor, in the order of the masters' partitions; where
    a parameter stands in it is read off its memory. Of DeepSpeed's own mapping only the masters' memory is taken, not
    its addresses, which are wrong under round_robin_gradients.
    """
    storage = parameter.untyped_storage().data_ptr()
    for other in model.parameters():
        mapping = getattr(other, "_hp_mapping", None)
        if mapping is None or other.untyped_storage().data_ptr() != storage:
            continue
        fragment = mapping.hp_fragment.detach()
        base = fragment.storage_offset() - mapping.hp_fragment_address.start
        size = fragment.untyped_storage().nbytes() // fragment.element_size() - base
        master = torch.as_strided(fragment, (size,), (1,), base)
        first, length = parameter.storage_offset(), parameter.numel()
        offset, start, owned = overlap(first, length, parameter._dp_group, size)
        return start, master[offset : offset + owned]
    return 0, torch.zeros(0, device=parameter.device)  # this rank's partition of the group is nothing but padding
