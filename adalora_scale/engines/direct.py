"""One process, DDP and FSDP2: the torch optimizer holds the adapter parameters themselves, in one call a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from operator import attrgetter, is_

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from adalora_scale.engines.pieces import (
    Piece,
    PieceState,
    direct_pieces,
    local,
    require_float32,
    restore_direct,
    trained_parameters,
)
from adalora_scale.engines.probing import See, misplaced
from adalora_scale.engines.span import LiveAdapters, Span
from adalora_scale.engines.squares import squares_of
from adalora_scale.errors import UserError

_GRADIENT = attrgetter("grad")


class DirectSharding:
    """Reads gradients and moments off the parameters; where the pieces of other ranks are, its subclasses know.

    Every step sees that nothing was exchanged since attach. Where lists are what they were, the interpreter's own loops
    find it (a tenth of a microsecond a tensor); only where one is not does Python look for what changed.
    """

    calls_per_step = 1
    spans: list[Span]
    cuts: list[Tensor]

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], optimizer: Optimizer) -> None:
        # Taken now: after a forward without backward (an evaluation) FSDP2 leaves modules with whole, plain parameters.
        self._model = model
        self._at_attach = trained_parameters(model)
        self._parameters = parameters
        self._live = LiveAdapters(model)
        self._optimizer = optimizer
        self._adapters = {id(parameter) for parameter in parameters}
        self._held_then: list[nn.Parameter] = []
        self._others_then: list[nn.Parameter] = []
        self._addresses: list[int] = []
        require_float32(self._at_attach, self._others())

    def updating(self, optimizer: Optimizer) -> list[int]:
        """Return every span but those of frozen parameters: all is updated in the one call.

        A parameter with requires_grad=False and no gradient was frozen after attach, to train in stages. It keeps none,
        so that the optimizer leaves it and its moments alone; a missing gradient of any other counts as zero.

        Raises:
            UserError: the parameters are not those of attach any more.
        """
        self._require_the_same_parameters()
        self._require_the_same_memory()
        return [i for i, p in enumerate(self._parameters) if p.requires_grad or p.grad is not None]

    def _require_the_same_parameters(self) -> None:
        live, held = self._live.parameters(), self._held()
        if _same(live, self._parameters) and _same(held, self._held_then):
            return
        there = {id(parameter) for parameter in held}
        for span, now, before in zip(self.spans, live, self._parameters, strict=True):
            if now is not before or id(before) not in there:
                raise UserError(
                    f"'{span.tensor.name}' is not the parameter it was at attach: the model was wrapped since, or "
                    f"given other ones (load_state_dict with assign=True). Call attach after that."
                )
        self._held_then, self._others_then = held, self._not_adapters(held)

    def _require_the_same_memory(self) -> None:
        pieces = [_piece_of(parameter) for parameter in self._parameters]
        if list(map(Tensor.data_ptr, pieces)) == self._addresses:
            return
        for span, now in zip(self.spans, pieces, strict=True):
            if now.numel() and now.data_ptr() != span.weight.data_ptr():
                raise UserError(
                    f"'{span.tensor.name}' was given other memory after attach (by .data = …, .to(device) or "
                    f"vector_to_parameters); change parameters in place (parameter.copy_), or attach afterwards."
                )
        self._addresses = [span.weight.data_ptr() for span in self.spans]

    def gradients(self, indices: list[int]) -> list[Tensor]:
        """Return this rank's pieces of the gradients, creating zeros where a parameter received none."""
        parameters: list[Tensor] = [self._parameters[index] for index in indices]
        found = list(map(_GRADIENT, parameters))
        if missing := [parameter for parameter, gradient in zip(parameters, found, strict=True) if gradient is None]:
            zeros = torch._foreach_mul(missing, 0.0)  # of their layouts, in one operation
            torch._foreach_zero_(zeros)
            for parameter, zero in zip(missing, zeros, strict=True):
                parameter.grad = zero
            found = list(map(_GRADIENT, parameters))
        return [_local_now(gradient) for gradient in found]

    def squares(self, gradients: list[Tensor]) -> Tensor:
        """Return the sums of squares of the adapters' gradients, and of all that the optimizer is going to apply."""
        others = [local(p.grad) for p in self._others() if p.grad is not None]
        each = squares_of([*gradients, *others])
        return torch.stack([each[: len(gradients)].sum(), each.sum()])

    def cancel(self, optimizer: Optimizer) -> None:
        """Remove every gradient: torch optimizers leave a parameter without one, and its moments, alone."""
        for parameter in self._held():
            parameter.grad = None

    def finish(self, optimizer: Optimizer) -> None:
        """Nothing to put back after an update."""

    def publish(self) -> None:
        """Nothing to copy: the model computes with, or gathers, these very tensors."""

    def missed_steps(self) -> int:
        """No engine stands between the loop and the optimizer."""
        return 0

    def moments(self) -> list[list[Tensor]]:
        """Return the optimizer's per-weight state of every span."""
        return [
            [
                local(value)
                for value in self._optimizer.state.get(parameter, {}).values()
                if isinstance(value, Tensor) and value.shape == parameter.shape and value.is_floating_point()
            ]
            for parameter in self._parameters
        ]

    def held_tensors(self) -> list[tuple[str, Tensor]]:
        """Return this rank's piece of every trained parameter, the adapters' first."""
        adapters = {span.tensor.name: span.weight for span in self.spans}
        others = {name: local(p.detach()) for name, p in self.trained().items() if name not in adapters}
        return [*adapters.items(), *others.items()]

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what was trained at attach, and what was unfrozen since."""
        self.refresh()
        return trained_parameters(self._model) | self._at_attach

    def pieces(self) -> list[Piece]:
        """Return what this rank holds of every trained parameter."""
        return direct_pieces(self.trained(), self._optimizer)

    def restore(self, states: Mapping[str, PieceState]) -> None:
        """Put optimizer state back."""
        restore_direct(self.trained(), self._optimizer, states)

    def refresh(self) -> None:
        """Nothing to copy, as above."""

    def probe(self, *, write: bool) -> str | None:
        """Compare the spans with what the forward computes with."""
        return misplaced(self, write=write)

    def see_forward(self, see: See) -> None:
        """Show the parameters that the live modules hold now."""
        for index, parameter in enumerate(self._live.parameters()):
            see(index, parameter.detach())

    def _others(self) -> list[nn.Parameter]:
        held = self._held()
        return self._others_then if _same(held, self._held_then) else self._not_adapters(held)

    def _not_adapters(self, held: list[nn.Parameter]) -> list[nn.Parameter]:
        return [parameter for parameter in held if id(parameter) not in self._adapters]

    def _held(self) -> list[nn.Parameter]:
        return list(chain.from_iterable(group["params"] for group in self._optimizer.param_groups))


def _same(now: Sequence[Tensor], then: Sequence[Tensor]) -> bool:
    """Return whether two lists hold the same objects."""
    return len(now) == len(then) and all(map(is_, now, then))


def _piece_of(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a DTensor; to_local() costs a dispatch a tensor."""
    return tensor if type(tensor) in (Tensor, nn.Parameter) else getattr(tensor, "_local_tensor", tensor)


def _local_now(tensor: Tensor) -> Tensor:
    """Return this rank's piece as `local` does, without a dispatch where it is there already."""
    piece = _piece_of(tensor)
    return piece if type(piece) is Tensor else local(tensor)
