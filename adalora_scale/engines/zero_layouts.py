"""Where DeepSpeed's ZeRO optimizers keep things: flat fp32 masters, and the low-precision values of the forward.

The only file that touches the internals of DeepSpeed's optimizers; names in use, as of DeepSpeed 0.19.8:
    ZeRO-1/2   single_partition_of_fp32_groups, bit16_groups_flat, parallel_partitioned_bit16_groups,
               averaged_gradients, real_dp_process_group, update_lp_params
    BF16       fp32_groups_flat_partition, bf16_groups_flat, real_dp_process_group, update_lp_params
    ZeRO-3     param.ds_tensor, ds_numel, grad_position, fp32_partitioned_groups_flat, fp16_partitioned_groups_flat,
               averaged_gradients, checkpoint_event_prologue, checkpoint_event_epilogue, dp_process_group,
               persistent_parameters, ds_persist, ds_status
Where a piece lies is read off the memory that the forward computes with wherever that is whole on a rank (ZeRO-1/2):
DeepSpeed's own mapping (`param._hp_mapping`) is wrong under round_robin_gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from adalora_scale.engines.pieces import Place
from adalora_scale.errors import Unsupported, UserError

NOWHERE: Place = (0, 0, 0, 0)
"""The place of a parameter of which this rank owns nothing."""


class Layout(Protocol):
    """What `ZeroSharding` asks of one kind of ZeRO optimizer."""

    calls: int
    """Calls of the base optimizer in one step."""

    def masters(self) -> list[Tensor]:
        """Return the flat fp32 partitions that the base optimizer updates, one a group."""

    def place(self, name: str, parameter: nn.Parameter) -> Place:
        """Return where this rank's piece of a parameter lies.

        Raises:
            UserError: the optimizer does not hold it.
        """

    def cuts(self, parameter: nn.Parameter) -> Tensor:
        """Return (n,) int64 on the CPU: the positions inside a parameter at which ranks' pieces of it meet."""

    def low_precision(self, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor]:
        """Return what this rank keeps of these parameters' low-precision values between two steps."""

    def computed(self, parameter: nn.Parameter, place: Place) -> Tensor:
        """Return what the forward computes with where this rank's piece lies, (length,), without asking other ranks."""

    def gathered(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return whole copies of what the forward computes with; a collective call."""

    def replicated(self) -> bool:
        """Return whether every rank holds the low-precision values whole."""

    def waiting_gradients(self) -> list[Tensor]:
        """Return reduced gradients of groups whose turn in the step has not come."""

    def publish(self, current: int) -> None:
        """Copy the masters of the groups before `current` into this rank's low-precision partitions."""

    def refresh(self) -> None:
        """Bring every low-precision copy on every rank up to date; a collective call between two steps."""


class FlatGroups:
    """ZeRO-1 and ZeRO-2: whole low-precision parameters are views of one flat tensor a group, cut into partitions."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.calls = len(self.masters())

    def masters(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def flats(self) -> list[Tensor]:
        return list(self.zero.bit16_groups_flat)

    def place(self, name: str, parameter: nn.Parameter) -> Place:
        storage, length = parameter.untyped_storage().data_ptr(), parameter.numel()
        for group, (flat, master) in enumerate(zip(self.flats(), self.masters(), strict=True)):
            first = int(parameter.storage_offset() - flat.storage_offset())
            if flat.untyped_storage().data_ptr() != storage or not 0 <= first <= flat.numel() - length:
                continue
            offset, start, owned = overlap(first, length, self.zero.real_dp_process_group[group], master.numel())
            return (group, offset, start, owned) if owned else NOWHERE
        raise UserError(
            f"DeepSpeed's optimizer does not hold '{name}'. Call inject_adalora before deepspeed.initialize, pass the "
            f"parameters with requires_grad=True, and do not give parameters other memory after it (.data = …, .to)."
        )

    def cuts(self, parameter: nn.Parameter) -> Tensor:
        storage, length = parameter.untyped_storage().data_ptr(), parameter.numel()
        for flat, master in zip(self.flats(), self.masters(), strict=True):
            first = int(parameter.storage_offset() - flat.storage_offset())
            if flat.untyped_storage().data_ptr() == storage and 0 <= first <= flat.numel() - length:
                return multiples_within(master.numel(), first, first + length) - first
        return multiples_within(1, 0, 0)

    def low_precision(self, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor]:
        return parameters

    def computed(self, parameter: nn.Parameter, place: Place) -> Tensor:
        _, _, start, length = place
        return parameter.detach().view(-1)[start : start + length]

    def gathered(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return [parameter.detach() for parameter in parameters]

    def replicated(self) -> bool:
        return True

    def waiting_gradients(self) -> list[Tensor]:
        return _averaged(self.zero)

    def publish(self, current: int) -> None:
        for index in range(current):
            rank = dist.get_rank(group=self.zero.real_dp_process_group[index])
            low = self.zero.parallel_partitioned_bit16_groups[index][rank]
            low.data.copy_(self.masters()[index].data)

    def refresh(self) -> None:
        self.zero.update_lp_params()


class Bf16Groups(FlatGroups):
    """BF16_Optimizer (ZeRO-1 with bf16 and fp32 accumulation): one call for all groups, copies made afterwards."""

    def __init__(self, zero: Any) -> None:
        super().__init__(zero)
        self.calls = 1

    def masters(self) -> list[Tensor]:
        return list(self.zero.fp32_groups_flat_partition)

    def flats(self) -> list[Tensor]:
        return list(self.zero.bf16_groups_flat)

    def waiting_gradients(self) -> list[Tensor]:
        return []

    def publish(self, current: int) -> None:
        """Copies come after the one call."""


class PartitionedGroups:
    """ZeRO-3: every parameter is partitioned by itself, sub-groups of partitions are stepped one by one."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        self.calls = len(zero.fp16_groups)

    def masters(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def place(self, name: str, parameter: Any) -> Place:
        if not hasattr(parameter, "ds_tensor"):
            raise Unsupported(
                f"'{name}' is not partitioned by ZeRO-3: nobody would reduce its gradient. Call inject_adalora "
                f"before deepspeed.initialize."
            )
        position = self.zero.grad_position.get(self.zero.get_param_id(parameter))
        if position is None:
            raise UserError(
                f"DeepSpeed's optimizer does not hold '{name}'; pass the parameters with requires_grad=True."
            )
        group, offset, numel = position
        start = dist.get_rank(group=self.zero.dp_process_group) * parameter.ds_tensor.ds_numel
        length = max(0, min(numel, parameter.ds_numel - start))  # the last partitions are padded
        return (group, offset, start, length) if length else NOWHERE

    def cuts(self, parameter: Any) -> Tensor:
        return multiples_within(parameter.ds_tensor.ds_numel, 0, parameter.ds_numel)

    def low_precision(self, parameters: Sequence[Any]) -> Sequence[Tensor]:
        return [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]

    def computed(self, parameter: Any, place: Place) -> Tensor:
        return parameter.ds_tensor.detach().view(-1)[: place[3]]

    def gathered(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        return gathered_as_forward(parameters)

    def replicated(self) -> bool:
        return False

    def waiting_gradients(self) -> list[Tensor]:
        return _averaged(self.zero)

    def publish(self, current: int) -> None:
        for index in range(current):
            low = self.zero.fp16_partitioned_groups_flat[index]
            if low is not None:
                low.data.copy_(self.masters()[index].data)

    def refresh(self) -> None:
        # Parameters that the last forward gathered may still be whole, with their old values; small ones always are.
        self.zero.checkpoint_event_prologue()
        self.publish(self.calls)
        self.zero.checkpoint_event_epilogue()


def layout_of(zero: Any) -> Layout:
    """Return the layout of a DeepSpeed optimizer.

    Raises:
        Unsupported: it is none of the known ones.
    """
    kinds: dict[str, Callable[[Any], Layout]] = {
        "DeepSpeedZeroOptimizer": FlatGroups,
        "BF16_Optimizer": Bf16Groups,
        "DeepSpeedZeroOptimizer_Stage3": PartitionedGroups,
    }
    kind = type(zero).__name__
    if kind not in kinds:
        raise Unsupported(
            f"DeepSpeed's {kind} is not supported; use ZeRO stage 1, 2 or 3 (with or without CPU offload of the "
            f"optimizer), not MiCS, ZenFlow, SuperOffload or stage 0 in low precision."
        )
    return kinds[kind](zero)


def partition_scales(zero: Any) -> None:
    """Let ZeRO-3 partition the scales of a 4-bit base too; other optimizers have none to partition.

    Small parameters stay whole on every rank (stage3_param_persistence_threshold); the scales are small one by one and
    gigabytes together.
    """
    persistent = getattr(zero, "persistent_parameters", [])
    for parameter in [p for p in persistent if p.dtype == torch.uint8]:
        parameter.ds_persist = False
        if parameter.ds_status.name == "AVAILABLE":
            parameter.partition()
    persistent[:] = [p for p in persistent if p.dtype != torch.uint8]


def multiples_within(step: int, begin: int, end: int) -> Tensor:
    """Return the multiples of `step` that lie between `begin` and `end`, neither included, int64 on the CPU."""
    first = (begin // step + 1) * step
    return torch.arange(first, max(first, end), step, dtype=torch.int64, device="cpu")


def overlap(first: int, length: int, group: dist.ProcessGroup, size: int) -> tuple[int, int, int]:
    """Return what this rank's partition holds of a run of elements of a flat tensor that is cut into equal partitions.

    Args:
        first, length: of the run, in the flat tensor.
        group: the ranks that own the partitions, in order.
        size: of a partition.

    Returns:
        (offset in the partition, start in the run, length), all 0 where it holds nothing.
    """
    begin = dist.get_rank(group=group) * size
    low, high = max(first, begin), min(first + length, begin + size)
    return (low - begin, low - first, high - low) if high > low else (0, 0, 0)


def gathered_as_forward(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Return whole copies of parameters that ZeRO-3 partitioned, as its forward gathers them; a collective call."""
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    # A forward without a backward (an evaluation) leaves on its way what it expects to need next, if one came before
    # the first step too; DeepSpeed cannot partition such a parameter again.
    for parameter in parameters:
        if parameter.ds_status == ZeroParamStatus.INFLIGHT:  # type: ignore[attr-defined]
            parameter._z3_optimizer.empty_partition_cache()  # type: ignore[attr-defined]
    with deepspeed.zero.GatheredParameters(list(parameters)):
        return [parameter.detach().clone() for parameter in parameters]


def refuse_options(zero: Any, engine: Any) -> None:
    """Refuse options under which pieces cannot be read and written in place.

    Raises:
        Unsupported: naming the option.
    """
    reasons = {
        "ZenFlow": bool(getattr(zero, "zenflow", False)),
        "NVMe offload": bool(getattr(zero, "swap_optimizer", False) or getattr(zero, "params_in_nvme_and_cpu", False)),
        "partial offload (offload_optimizer.ratio < 1)": (
            bool(getattr(zero, "offload_optimizer", False)) and getattr(zero, "partial_offload", 1.0) != 1.0
        ),
        "torch.autocast with DeepSpeed's GradScaler": bool(getattr(zero, "torch_autocast_gradscaler", None)),
        "DeepCompile": bool(getattr(engine, "_deepcompile_active", False)),
        "Muon": bool(getattr(zero, "use_muon", False)),
    }
    for name, present in reasons.items():
        if present:
            raise Unsupported(f"{name} is not supported under AdaLoRA; switch it off in DeepSpeed's configuration.")


def _averaged(zero: Any) -> list[Tensor]:
    """Return the reduced gradients of groups whose turn has not come (not yet unscaled or clipped)."""
    waiting = []
    for pieces in zero.averaged_gradients.values():
        waiting += [piece for piece in pieces or [] if isinstance(piece, Tensor)]
    return waiting
