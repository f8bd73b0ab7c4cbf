"""DeepSpeed ZeRO-1, 2 and 3 and BF16_Optimizer: flat fp32 partitions, one call of the base optimizer a group.

The only file that touches DeepSpeed's internals; names in use, as of DeepSpeed 0.19.8:
    ZeRO-1/2   param._hp_mapping (tensor_fragment), single_partition_of_fp32_groups, averaged_gradients,
               parallel_partitioned_bit16_groups, real_dp_process_group, bit16_groups, update_lp_params
    BF16       fp32_groups_flat_partition, _hp_mapping, update_lp_params
    ZeRO-3     param.ds_tensor, ds_numel, grad_position, fp32_partitioned_groups_flat, fp16_partitioned_groups_flat,
               averaged_gradients, checkpoint_event_prologue, checkpoint_event_epilogue, dp_process_group,
               persistent_parameters, ds_persist, ds_status
`_verify` proves on live parameters, at attach, that these still mean what they meant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from adalora_scale.engines.pieces import Piece, PieceState, Place, flat_pieces, restore_flat, trained_parameters
from adalora_scale.engines.span import AdapterTensor, Span, adapter_tensors, gathered_extents
from adalora_scale.errors import Unsupported, UserError


class ZeroSharding:
    """Spans that are views into the flat fp32 partitions of a DeepSpeed optimizer.

    Args:
        model: the model given to `deepspeed.initialize`, or the engine.
        zero_optimizer: DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3 or BF16_Optimizer.
        engine: the DeepSpeed engine where it is at hand; it knows of steps dropped on overflow.

    Raises:
        UserError: the optimizer does not hold an adapter parameter.
        Unsupported: an option of DeepSpeed under which spans cannot be read and written in place.
    """

    def __init__(self, model: nn.Module, zero_optimizer: Any, engine: Any = None) -> None:
        self._model = model
        self._zero = zero_optimizer
        self._engine = engine
        self._layout = _layout(zero_optimizer)
        _refuse_options(zero_optimizer, engine)
        self._flats: list[Tensor] = self._layout.flats()
        self._group: dist.ProcessGroup = zero_optimizer.dp_process_group
        tensors = adapter_tensors(model)
        self._device = tensors[0][1].device
        self._tensors = tensors
        self._places: list[tuple[int, int]] = []  # (group, offset in its flat partition)
        self.spans: list[Span] = []
        for tensor, parameter in tensors:
            group, offset, start, length = self._layout.place(tensor.name, parameter)
            weight = self._flats[group].detach()[offset : offset + length]
            if weight.dtype != torch.float32:
                raise Unsupported(
                    f"'{tensor.name}' has {weight.dtype} master weights; keep fp32 masters (remove "
                    f"bf16_master_weights_and_grads / fp16_master_weights_and_grads from DeepSpeed's configuration)."
                )
            self._places.append((group, offset))
            self.spans.append(Span(tensor=tensor, start=start, weight=weight))
        self.calls_per_step = self._layout.calls
        self.extents = gathered_extents(self.spans, self._group)
        self._current = 0
        self._taken: list[tuple[Tensor, Tensor | None, dict[str, Any], Any]] = []
        self._skipped = self._engine_skipped()
        self._verify(tensors)

    def agree(self, squares: Tensor) -> None:
        """Nothing to do: the sums went over all ranks."""

    # ---- the call in progress -----------------------------------------------------------------------------------

    def updating(self, optimizer: Optimizer) -> list[int]:
        """Return the spans of the groups whose flat partition the optimizer holds during this call."""
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        groups = {index for index, flat in enumerate(self._flats) if id(flat) in held}
        self._current = min(groups, default=0)
        return [index for index, (group, _) in enumerate(self._places) if group in groups]

    def gradients(self, indices: list[int]) -> list[Tensor]:
        """Return (length,) views of the flat fp32 gradients."""
        result = []
        for index in indices:
            group, offset = self._places[index]
            flat = self._flats[group]
            if flat.grad is None:
                flat.grad = torch.zeros_like(flat)
            result.append(flat.grad.view(-1)[offset : offset + self.spans[index].weight.numel()])
        return result

    def local_gradients(self) -> list[Tensor]:
        """Return the gradients of the group in progress and of those that wait for their turn."""
        ready = [flat.grad for flat in self._flats if flat.grad is not None]
        return ready + self._layout.waiting_gradients()

    def cancel(self, optimizer: Optimizer) -> None:
        """Take the gradients away for the time of the call; FusedAdam also counts a step that does nothing."""
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self._taken.append((parameter, parameter.grad, group, group.get("step")))
                parameter.grad = None

    def finish(self, optimizer: Optimizer) -> None:
        """Give the gradients back: CPU offload keeps them as its accumulation buffers."""
        for parameter, gradient, group, step in self._taken:
            parameter.grad = gradient
            if step is not None:
                group["step"] = step
        self._taken.clear()

    # ---- over ranks ---------------------------------------------------------------------------------------------

    def all_reduce(self, buffer: Tensor) -> None:
        """Sum over the data-parallel ranks."""
        moved = buffer.to(self._device)  # CPU-offloaded spans; NCCL reduces on the device only
        dist.all_reduce(moved, group=self._group)
        if moved is not buffer:
            buffer.copy_(moved)

    def broadcast(self, tensor: Tensor) -> None:
        """Take the first data-parallel rank's tensor."""
        moved = tensor.to(self._device)
        dist.broadcast(moved, src=dist.get_global_rank(self._group, 0), group=self._group)
        if moved is not tensor:
            tensor.copy_(moved)

    # ---- masters, low-precision copies, moments -----------------------------------------------------------------

    def publish(self) -> None:
        """Copy the masters of groups that were stepped before the current one into their low-precision partitions."""
        self._layout.publish(self._current)

    def write(self, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Overwrite parameters with whole values in the masters, then refresh every rank's low-precision copies."""
        for parameter, value in values:
            group, offset, start, length = self._layout.place("a parameter", parameter)
            piece = value.reshape(-1)[start : start + length]
            self._flats[group].detach()[offset : offset + length].copy_(piece)
        self._layout.refresh()

    def pieces(self) -> list[Piece]:
        """Return this rank's non-empty pieces of every trained parameter."""
        return flat_pieces(self._flats, self._placed(), self._zero.optimizer)

    def restore(self, states: Mapping[str, PieceState]) -> None:
        """Put optimizer state into the flat partitions."""
        restore_flat(self._flats, self._placed(), self._zero.optimizer, states)

    def refresh(self) -> None:
        """Copy every master into the low-precision copies."""
        self._layout.refresh()

    def _placed(self) -> dict[str, Place]:
        found = {n: self._layout.place(n, p) for n, p in trained_parameters(self._model).items()}
        return {name: place for name, place in found.items() if place[3]}

    def replicas(self) -> tuple[list[tuple[str, Tensor]], dist.ProcessGroup | None]:
        """Under ZeRO-1 and 2 every rank computes with whole low-precision copies; under ZeRO-3 nobody does."""
        if isinstance(self._layout, _PartitionedGroups):
            return [], self._group
        return [(tensor.name, parameter.detach()) for tensor, parameter in self._tensors], self._group

    def missed_steps(self) -> int:
        """Return the steps that the engine dropped on overflow since the last question (0 without the engine)."""
        before, self._skipped = self._skipped, self._engine_skipped()
        return self._skipped - before

    def moments(self) -> list[list[Tensor]]:
        """Return the base optimizer's per-weight state of every span."""
        base = self._zero.optimizer
        result = []
        for span, (group, offset) in zip(self.spans, self._places, strict=True):
            flat = self._flats[group]
            state = base.state.get(flat, {})
            result.append(
                [
                    value.view(-1)[offset : offset + span.weight.numel()]
                    for value in state.values()
                    if isinstance(value, Tensor) and value.numel() == flat.numel() and value.is_floating_point()
                ]
            )
        return result

    def _engine_skipped(self) -> int:
        return int(getattr(self._engine, "skipped_steps", 0))

    @torch.no_grad()
    def _verify(self, tensors: list[tuple[AdapterTensor, nn.Parameter]]) -> None:
        """Compare every span with what DeepSpeed's public accessor returns, and see that a write arrives there.

        Raises:
            Unsupported: this version of DeepSpeed keeps its masters elsewhere.
        """
        from deepspeed.utils import safe_get_full_fp32_param

        for number, ((tensor, parameter), span) in enumerate(zip(tensors, self.spans, strict=True)):
            before = span.weight.clone()
            span.weight.add_(1.0 if number == 0 else 0.0)
            full = safe_get_full_fp32_param(parameter)
            seen = None if full is None else full.reshape(-1)[span.start : span.start + span.weight.numel()]
            same = seen is not None and torch.equal(seen.to(span.weight.device), span.weight)
            span.weight.copy_(before)  # subtracting would round
            agreed = torch.tensor(float(same), dtype=torch.float32, device=self._device)
            dist.all_reduce(agreed, op=dist.ReduceOp.MIN, group=self._group)
            if not agreed:
                import deepspeed

                raise Unsupported(
                    f"DeepSpeed {deepspeed.__version__} does not keep the master weights of '{tensor.name}' where "
                    f"adalora_scale looks for them; install a version within pyproject's range."
                )


class _FlatGroups:
    """ZeRO-1 and ZeRO-2."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero

    @property
    def calls(self) -> int:
        return len(self.zero.bit16_groups)

    def flats(self) -> list[Tensor]:
        return list(self.zero.single_partition_of_fp32_groups)

    def place(self, name: str, parameter: Any) -> tuple[int, int, int, int]:
        """Return (group, offset in the flat partition, start in the tensor, length) of this rank's piece."""
        if not hasattr(parameter, "_hp_mapping"):
            raise UserError(
                f"DeepSpeed's optimizer does not hold '{name}'. Call inject_adalora before deepspeed.initialize "
                f"and pass the parameters with requires_grad=True."
            )
        mapping = parameter._hp_mapping
        if mapping is None:  # all of it lies in other ranks' partitions
            return 0, 0, 0, 0
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return mapping.param_group_index, high.start, low.start, low.numel

    def waiting_gradients(self) -> list[Tensor]:
        return _averaged(self.zero)

    def publish(self, current: int) -> None:
        for index in range(current):
            rank = dist.get_rank(group=self.zero.real_dp_process_group[index])
            low = self.zero.parallel_partitioned_bit16_groups[index][rank]
            low.data.copy_(self.zero.single_partition_of_fp32_groups[index].data)

    def refresh(self) -> None:
        self.zero.update_lp_params()


class _Bf16Groups(_FlatGroups):
    """BF16_Optimizer (ZeRO-1 with bf16 and fp32 accumulation): one call for all groups, copies made afterwards."""

    @property
    def calls(self) -> int:
        return 1

    def flats(self) -> list[Tensor]:
        return list(self.zero.fp32_groups_flat_partition)

    def waiting_gradients(self) -> list[Tensor]:
        return []

    def publish(self, current: int) -> None:
        """Copies come after the one call."""


class _PartitionedGroups:
    """ZeRO-3: every parameter is partitioned by itself, sub-groups of partitions are stepped one by one."""

    def __init__(self, zero: Any) -> None:
        self.zero = zero
        # Small parameters stay whole on every rank (stage3_param_persistence_threshold); the scales of a 4-bit base are
        # small one by one and gigabytes together.
        for parameter in [p for p in zero.persistent_parameters if p.dtype == torch.uint8]:
            parameter.ds_persist = False
            if parameter.ds_status.name == "AVAILABLE":
                parameter.partition()
        zero.persistent_parameters[:] = [p for p in zero.persistent_parameters if p.dtype != torch.uint8]

    @property
    def calls(self) -> int:
        return len(self.zero.fp16_groups)

    def flats(self) -> list[Tensor]:
        return list(self.zero.fp32_partitioned_groups_flat)

    def place(self, name: str, parameter: Any) -> tuple[int, int, int, int]:
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
        rank = dist.get_rank(group=self.zero.dp_process_group)
        start = rank * parameter.ds_tensor.ds_numel
        length = max(0, min(numel, parameter.ds_numel - start))  # the last partitions are padded
        return group, offset, start if length else 0, length

    def waiting_gradients(self) -> list[Tensor]:
        return _averaged(self.zero)

    def publish(self, current: int) -> None:
        for index in range(current):
            low = self.zero.fp16_partitioned_groups_flat[index]
            if low is not None:
                low.data.copy_(self.zero.fp32_partitioned_groups_flat[index].data)

    def refresh(self) -> None:
        # Parameters that the last forward gathered may still be whole, with their old values; small ones always are.
        self.zero.checkpoint_event_prologue()
        self.publish(self.calls)
        self.zero.checkpoint_event_epilogue()


def full_parameter(parameter: nn.Parameter) -> Tensor:
    """Return the whole fp32 master of a parameter under ZeRO; a collective call."""
    from deepspeed.utils import safe_get_full_fp32_param

    full = safe_get_full_fp32_param(parameter)
    if full is None:
        raise Unsupported("DeepSpeed returned no fp32 weight for a trainable parameter.")
    return full


def gathered_parameter(parameter: nn.Parameter) -> Tensor:
    """Return the whole value of a frozen parameter that ZeRO-3 partitioned; a collective call."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().clone()


def _averaged(zero: Any) -> list[Tensor]:
    """Return the reduced gradients of groups whose turn has not come (not yet unscaled or clipped)."""
    waiting = []
    for pieces in zero.averaged_gradients.values():
        waiting += [piece for piece in pieces or [] if isinstance(piece, Tensor)]
    return waiting


def _layout(zero: Any) -> _FlatGroups | _PartitionedGroups:
    match type(zero).__name__:
        case "DeepSpeedZeroOptimizer":
            return _FlatGroups(zero)
        case "BF16_Optimizer":
            return _Bf16Groups(zero)
        case "DeepSpeedZeroOptimizer_Stage3":
            return _PartitionedGroups(zero)
        case other:
            raise Unsupported(
                f"DeepSpeed's {other} is not supported; use ZeRO stage 1, 2 or 3 (with or without CPU offload of the "
                f"optimizer), not MiCS, ZenFlow, SuperOffload or stage 0 in low precision."
            )


def _refuse_options(zero: Any, engine: Any) -> None:
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
