"""Whole parameters, whoever holds the pieces."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from adalora_scale.engines import zero


@torch.no_grad()
def full_parameter(parameter: nn.Parameter) -> Tensor:
    """Return the whole value of a parameter: the fp32 master where an engine keeps one.

    A collective call where the parameter is sharded: every rank calls it for the same parameters in the same order.
    """
    if isinstance(parameter, DTensor):
        # FSDP2's CPU offload keeps shards on the host, where NCCL cannot gather.
        whole: Tensor = parameter.to(parameter.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined]
        return whole
    if hasattr(parameter, "ds_id") and not parameter.requires_grad:
        return zero.gathered_parameter(parameter)
    if hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
        return zero.full_parameter(parameter)
    return parameter.detach()
