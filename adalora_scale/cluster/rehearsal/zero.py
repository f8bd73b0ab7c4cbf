"""DeepSpeed's ZeRO optimizers by their partition rules: its own cannot be built for ranks that are not there.

What stands here is what `engines/zero_layouts.py` reads off DeepSpeed's optimizers (0.19.8), over tensors without
values; everything above it, `ZeroSharding` with its layouts, is the code of a real run.

    ZeRO-1/2  all trained parameters one after the other in one flat tensor, padded to twice the ranks and cut into
              equal partitions
    ZeRO-3    every parameter cut by itself into equal partitions, the last ones padded; one sub-group
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adalora_scale.checkpoint.layout import Run
from adalora_scale.cluster.rehearsal.pretended import DEVICE
from adalora_scale.cluster.rehearsal.rank import Moments, Rehearsed, take_steps
from adalora_scale.config import AdaLoraConfig
from adalora_scale.engines import zero_layouts

BY_RULE = "DeepSpeed's partitions (one parameter group, one sub-group) and its gathers; its optimizer is not built"
_ALIGNED = 2
"""Flat partitions of ZeRO-1/2 begin at multiples of so many elements."""


def rehearse_zero(model: nn.Module, stage: int, config: AdaLoraConfig) -> Rehearsed:
    """Attach and step with the parameters where ZeRO of this stage would hold them.

    Args:
        model: with adapters, on the meta device; changed.
        stage: 1, 2 or 3.
        config: the run's options.
    """
    make = _stage_3 if stage == 3 else _flat
    zero, master = make([parameter for parameter in model.parameters() if parameter.requires_grad])
    base = zero.optimizer

    def give_gradients() -> None:
        master.grad = torch.empty_like(master)

    with mock.patch.object(zero_layouts, "gathered_as_forward", _gathered):
        rehearsed = take_steps(
            model, zero, base, config, give_gradients=give_gradients, step_group=lambda group: base.step()
        )
    return Rehearsed(rehearsed.model, rehearsed.allocator, rehearsed.phases, BY_RULE)


def zero_runs(shapes: Mapping[str, Sequence[int]], stage: int, ranks: int) -> dict[str, Run]:
    """Return which ranks hold what of each trained tensor.

    Args:
        shapes: name → whole shape of everything that is trained, in the order of the model's parameters.
        stage: 1, 2 or 3.
        ranks: of the run.
    """
    counts = {name: math.prod(shape) for name, shape in shapes.items()}
    if stage == 3:
        return {name: (0, -(-count // ranks), -(-count // ranks)) for name, count in counts.items()}
    size, first, runs = _partition(sum(counts.values()), ranks), 0, {}
    for name, count in counts.items():
        runs[name] = first // size, min(size - first % size, count), size
        first += count
    return runs


def _partition(elements: int, ranks: int) -> int:
    return -(-elements // (ranks * _ALIGNED)) * _ALIGNED


def _stage_3(trained: list[nn.Parameter]) -> tuple[Any, nn.Parameter]:
    ranks = dist.get_world_size()
    position, offset = {}, 0
    for parameter in trained:
        each = -(-parameter.numel() // ranks)
        partition: Any = torch.empty(each, dtype=torch.bfloat16, device=DEVICE)
        partition.ds_numel = each
        held: Any = parameter
        held.ds_shape, held.ds_numel, held.ds_tensor = parameter.shape, parameter.numel(), partition
        position[id(parameter)] = (0, offset, each)
        offset += each
    master = nn.Parameter(torch.empty(offset, dtype=torch.float32, device=DEVICE))
    members: dict[str, Any] = {
        "fp16_groups": [trained],
        "fp32_partitioned_groups_flat": [master],
        "fp16_partitioned_groups_flat": [torch.empty(offset, dtype=torch.bfloat16, device=DEVICE)],
        "grad_position": position,
        "get_param_id": id,
        "dp_process_group": dist.group.WORLD,
        "checkpoint_event_prologue": _nothing,
        "checkpoint_event_epilogue": _nothing,
    }
    return _named("DeepSpeedZeroOptimizer_Stage3", members, master), master


def _flat(trained: list[nn.Parameter]) -> tuple[Any, nn.Parameter]:
    ranks, rank = dist.get_world_size(), dist.get_rank()
    size = _partition(sum(parameter.numel() for parameter in trained), ranks)
    whole, first = torch.empty(size * ranks, dtype=torch.bfloat16, device=DEVICE), 0
    for parameter in trained:
        parameter.data = whole[first : first + parameter.numel()].view(parameter.shape)
        first += parameter.numel()
    master = nn.Parameter(torch.empty(size, dtype=torch.float32, device=DEVICE))
    own = whole[rank * size : (rank + 1) * size]

    def update_lp_params() -> None:
        dist.all_gather_into_tensor(whole, own)

    members: dict[str, Any] = {
        "single_partition_of_fp32_groups": [master],
        "bit16_groups_flat": [whole],
        "parallel_partitioned_bit16_groups": [{rank: own}],
        "real_dp_process_group": [dist.group.WORLD],
        "dp_process_group": dist.group.WORLD,
        "update_lp_params": update_lp_params,
    }
    return _named("DeepSpeedZeroOptimizer", members, master), master


def _named(name: str, members: dict[str, Any], master: nn.Parameter) -> Any:
    """Return an object that the engines take for DeepSpeed's optimizer of this name."""
    kind: Callable[..., Any] = type(name, (SimpleNamespace,), {"__module__": "deepspeed"})
    return kind(optimizer=Moments([master]), averaged_gradients={}, **members)


def _nothing() -> None:
    """What DeepSpeed keeps gathered of small parameters is not rehearsed."""


def _gathered(parameters: Sequence[Any]) -> list[Tensor]:
    """Return whole tensors as DeepSpeed's GatheredParameters does, by one collective for them together."""
    partition = torch.cat([parameter.ds_tensor for parameter in parameters])
    whole = torch.empty(partition.numel() * dist.get_world_size(), dtype=partition.dtype, device=DEVICE)
    dist.all_gather_into_tensor(whole, partition)
    return [torch.empty(parameter.ds_shape, dtype=whole.dtype, device=DEVICE) for parameter in parameters]
