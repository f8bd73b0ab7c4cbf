"""Whole parameters, whoever holds the pieces."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adalora_scale.engines.probing import same_values
from adalora_scale.engines.zero_layouts import Layout, gathered_as_forward, layout_of
from adalora_scale.errors import Unsupported


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


def _from_masters(parameter: Any, model: nn.Module) -> Tensor:
    """Put the ranks' pieces of a ZeRO optimizer's masters together, and see that the forward computes with them."""
    layout = _layout_behind(model)
    group = parameter.ds_process_group if hasattr(parameter, "ds_id") else parameter._dp_group
    shape = parameter.ds_shape if hasattr(parameter, "ds_id") else parameter.shape
    computed = gathered_as_forward([parameter])[0] if hasattr(parameter, "ds_id") else parameter.detach()
    whole = torch.zeros(shape.numel(), dtype=torch.float32, device=computed.device)
    if layout is not None:
        index, offset, start, length = layout.place("a trained parameter", parameter)
        whole[start : start + length] = layout.masters()[index].detach()[offset : offset + length]
    elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:  # BF16_Optimizer cannot be found from here
        start, length = mapping.lp_fragment_address.start, mapping.lp_fragment_address.numel
        whole[start : start + length] = mapping.hp_fragment.detach()
    dist.all_reduce(whole, group=group)
    if not same_values(whole, computed.reshape(-1)):
        raise Unsupported(
            "DeepSpeed's master weights are not the values that the forward computes with; an option of its "
            "configuration moves them where adalora_scale does not look. Nothing was saved."
        )
    return whole.view(shape)


def _layout_behind(model: nn.Module) -> Layout | None:
    """Find DeepSpeed's optimizer through any of its parameters; a rank whose partitions are empty has none."""
    for parameter in model.parameters():
        for link in ("_z3_optimizer", "_zero_optimizer"):
            if (zero := getattr(parameter, link, None)) is not None:
                return layout_of(zero)
    return None
