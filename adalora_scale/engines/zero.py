"""DeepSpeed ZeRO-1, 2 and 3 and BF16_Optimizer: flat fp32 partitions, one call of the base optimizer a group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from adalora_scale.engines.pieces import Piece, PieceState, Place, flat_pieces, restore_flat, trained_parameters
from adalora_scale.engines.probing import See, misplaced, same_values
from adalora_scale.engines.span import LiveAdapters, Span, adapter_tensors
from adalora_scale.engines.squares import squares_of
from adalora_scale.engines.zero_layouts import layout_of, partition_scales, refuse_options
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
        self._layout = layout_of(zero_optimizer)
        refuse_options(zero_optimizer, engine)
        partition_scales(zero_optimizer)
        self._group: dist.ProcessGroup = zero_optimizer.dp_process_group
        self._tensors = adapter_tensors(model)
        self._parameters = [parameter for _, parameter in self._tensors]
        self._at_attach = trained_parameters(model)
        self._live = LiveAdapters(model)
        self._device = self._parameters[0].device
        self._places = self._found_places()
        self._flats = self._layout.masters()
        self._cutting = self._cut_flats()
        self.spans = self._views()
        self._seen = self._addresses()
        self.calls_per_step = self._layout.calls
        self._current = 0
        self._taken: list[tuple[Tensor, Tensor | None, dict[str, Any], Any]] = []
        self._skipped = self._engine_skipped()

    def connect(self) -> None:
        """Find out where the pieces of all ranks meet."""
        self.cuts = [self._layout.cuts(parameter) for parameter in self._parameters]

    # ---- where the spans are ------------------------------------------------------------------------------------

    def _found_places(self) -> list[Place]:
        return [self._layout.place(tensor.name, parameter) for tensor, parameter in self._tensors]

    def _views(self) -> list[Span]:
        spans = []
        for (tensor, _), (group, offset, start, length) in zip(self._tensors, self._places, strict=True):
            weight = self._flats[group].detach()[offset : offset + length]
            if weight.dtype != torch.float32:
                raise Unsupported(
                    f"'{tensor.name}' has {weight.dtype} master weights; keep fp32 masters (remove "
                    f"bf16_master_weights_and_grads / fp16_master_weights_and_grads from DeepSpeed's configuration)."
                )
            spans.append(Span(tensor=tensor, start=start, weight=weight, shape=(length,), group=group))
        return spans

    def _addresses(self) -> list[int]:
        live, kept = self._live.parameters(), self._layout.low_precision
        written = [tensor._version for tensor in kept(list(self._at_attach.values()))]  # by others, in place
        memory = [tensor.data_ptr() for tensor in (*self._layout.masters(), *kept(live))]
        return [*memory, *map(id, live), *written]

    def _follow(self) -> None:
        """Take the views anew where DeepSpeed moved its memory (offload_states, reload_states).

        Raises:
            UserError: somebody else moved it, so that the forward computes with values that DeepSpeed does not update,
                or wrote into it, which DeepSpeed's masters would undo.
        """
        now = self._addresses()
        if now == self._seen:
            return
        for span, live, parameter in zip(self.spans, self._live.parameters(), self._parameters, strict=True):
            if live is not parameter:
                raise UserError(
                    f"'{span.tensor.name}' is not the parameter it was at attach (load_state_dict with assign=True?); "
                    f"DeepSpeed does not update the new one. Change parameters in place."
                )
        places, self._flats = self._found_places(), self._layout.masters()
        if places != self._places:
            raise UserError("DeepSpeed's partitions changed after attach; attach after deepspeed.initialize, once.")
        self.spans = self._views()
        for name, parameter in self._at_attach.items():
            group, offset, _, length = place = self._layout.place(name, parameter)
            master = self._flats[group].detach()[offset : offset + length]
            if not same_values(master, self._layout.computed(parameter, place)):
                raise UserError(
                    f"'{name}' was changed after attach (by load_state_dict, copy_, .data = … or .to(device)), which "
                    f"DeepSpeed's own masters would undo; change parameters before deepspeed.initialize, or load with "
                    f"the engine's load_checkpoint."
                )
        self._seen = now

    def probe(self, *, write: bool) -> str | None:
        """Compare the spans with what the forward computes with."""
        self._follow()
        return misplaced(self, write=write)

    def see_forward(self, see: See) -> None:
        """Gather layer by layer, as a forward does."""
        indices = range(len(self._tensors))
        layers: dict[int, list[int]] = {}
        for index in indices:
            layers.setdefault(self._tensors[index][0].layer, []).append(index)
        live = self._live.parameters()
        for own in layers.values():
            for index, whole in zip(own, self._layout.gathered([live[index] for index in own]), strict=True):
                see(index, whole)

    # ---- the call in progress -----------------------------------------------------------------------------------

    def updating(self, optimizer: Optimizer) -> list[int]:
        """Return the spans of the groups whose flat partition the optimizer holds during this call.

        Raises:
            Unsupported: what was trained was frozen after attach; one gradient of a flat partition serves all in it.
        """
        self._follow()
        for name, parameter in self._at_attach.items():
            if not parameter.requires_grad:
                raise Unsupported(
                    f"'{name}' was frozen (requires_grad=False) after attach: DeepSpeed's flat partitions go on "
                    f"moving it. Train in stages under DDP or FSDP2, or with a DeepSpeed engine for each stage."
                )
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        groups = {index for index, flat in enumerate(self._flats) if id(flat) in held}
        self._current = min(groups, default=0)
        return [index for index, (group, *_) in enumerate(self._places) if group in groups]

    def gradients(self, indices: list[int]) -> list[Tensor]:
        """Return (length,) views of the flat fp32 gradients."""
        flats = {}
        for group in {self._places[index][0] for index in indices}:
            flat = self._flats[group]
            if flat.grad is None:
                flat.grad = torch.zeros_like(flat)
            flats[group] = flat.grad
        found = self._split(flats)
        return [found[index] for index in indices]

    def squares(self, gradients: list[Tensor]) -> Tensor:
        """Return the sums of squares of these, and of the groups in progress and those that wait for their turn."""
        ready = [flat.grad for flat in self._flats if flat.grad is not None]
        everything = squares_of(ready + self._layout.waiting_gradients()).sum()
        return torch.stack([squares_of(gradients).sum().to(everything.device), everything])

    def _split(self, flats: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return span → its (length,) view of a flat tensor of its group; one operation a flat tensor."""
        found = {}
        for group, flat in flats.items():
            # Of what lies between the adapters too: cutting everywhere is one operation, a view each is as many.
            sizes, spans = self._cutting[group]
            found.update({index: view for index, view in zip(spans, flat.split(sizes), strict=True) if index >= 0})
        return found

    def _cut_flats(self) -> dict[int, tuple[list[int], list[int]]]:
        """Return group → sizes of consecutive pieces of its flat tensor, and whose they are (−1: no adapter's)."""
        result = {}
        for number, flat in enumerate(self._flats):
            sizes, spans, end = [], [], 0
            own = sorted((offset, length, i) for i, (g, offset, _, length) in enumerate(self._places) if g == number)
            for offset, length, index in own:
                if offset > end:
                    sizes.append(offset - end)
                    spans.append(-1)
                sizes.append(length)
                spans.append(index)
                end = max(end, offset + length)
            if flat.numel() > end:
                sizes.append(flat.numel() - end)
                spans.append(-1)
            result[number] = sizes, spans
        return result

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

    def agree(self, squares: Tensor) -> None:
        """Nothing to do: the sums went over all ranks."""

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
        self._follow()
        for parameter, value in values:
            group, offset, start, length = self._layout.place("a parameter", parameter)
            piece = value.reshape(-1)[start : start + length]
            self._flats[group].detach()[offset : offset + length].copy_(piece)
        self._layout.refresh()

    def pieces(self) -> list[Piece]:
        """Return this rank's non-empty pieces of every trained parameter."""
        self._follow()
        return flat_pieces(self._flats, self._placed(), self._zero.optimizer)

    def restore(self, states: Mapping[str, PieceState]) -> None:
        """Put optimizer state into the flat partitions."""
        self._follow()
        restore_flat(self._flats, self._placed(), self._zero.optimizer, states)

    def refresh(self) -> None:
        """Copy every master into the low-precision copies."""
        self._layout.refresh()

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what was trained at attach, and what was unfrozen since."""
        return trained_parameters(self._model) | self._at_attach

    def _placed(self) -> dict[str, Place]:
        found = {n: self._layout.place(n, p) for n, p in self.trained().items()}
        return {name: place for name, place in found.items() if place[3]}

    def replicas(self) -> tuple[list[tuple[str, Tensor]], dist.ProcessGroup | None]:
        """Under ZeRO-1 and 2 every rank computes with whole low-precision copies; under ZeRO-3 nobody does."""
        if not self._layout.replicated():
            return [], self._group
        adapters = {tensor.name: parameter for tensor, parameter in self._tensors}
        return [(name, parameter.detach()) for name, parameter in (adapters | self.trained()).items()], self._group

    def missed_steps(self) -> int:
        """Return the steps that the engine dropped on overflow since the last question (0 without the engine)."""
        before, self._skipped = self._skipped, self._engine_skipped()
        return self._skipped - before

    def moments(self) -> list[list[Tensor]]:
        """Return the base optimizer's per-weight state of every span."""
        base = self._zero.optimizer
        result: list[list[Tensor]] = [[] for _ in self._places]
        for group, flat in enumerate(self._flats):
            for value in base.state.get(flat, {}).values():
                if isinstance(value, Tensor) and value.numel() == flat.numel() and value.is_floating_point():
                    for index, view in self._split({group: value.view(-1)}).items():
                        result[index].append(view)
        return result

    def _engine_skipped(self) -> int:
        return int(getattr(self._engine, "skipped_steps", 0))
