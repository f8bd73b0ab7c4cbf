"""The vocabulary of sharding: an adapter tensor, the span of it that this rank owns, and what an engine must offer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from adalora_scale.adalora.adaptables import FACTORS
from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.engines.pieces import Piece, PieceState
from adalora_scale.errors import UserError


@dataclass(frozen=True)
class AdapterTensor:
    """One adapter tensor of the whole model: (matrices · rows, r) row-major, matrix by matrix; `lora_E` has one row a
    matrix."""

    layer: int
    """Position of its module among the adapted modules."""
    module: str
    factor: str
    """`lora_A`, `lora_E` or `lora_B`."""
    rows: int
    """Of one matrix."""
    r: int
    matrices: int = 1
    """How many its module stands for: 1, or one for each expert."""
    matrix: int = 0
    """Number of the first of them among all adapted matrices."""
    triplet: int = 0
    """Number of its first triplet among all that the adapters hold now."""

    @property
    def name(self) -> str:
        """Name of the parameter in the unwrapped model."""
        return f"{self.module}.{self.factor}"

    @property
    def numel(self) -> int:
        """Elements of the whole tensor."""
        return self.matrices * self.rows * self.r

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole parameter."""
        if self.factor != "lora_E":
            return self.matrices * self.rows, self.r
        return (self.r,) if self.matrices == 1 else (self.matrices, self.r)


@dataclass(frozen=True)
class Span:
    """The contiguous row-major piece of an adapter tensor whose fp32 weight this rank's optimizer owns."""

    tensor: AdapterTensor
    start: int
    """Index of the first element in the whole tensor."""
    weight: Tensor
    """(length,) float32, a view of the optimizer's master weight; may be empty."""
    shape: tuple[int, ...]
    """Of the weight, its gradient and its moments where the optimizer keeps them."""
    group: int = 0
    """Spans of one group are updated in one call of the optimizer."""


class StepFace(Protocol):
    """What an optimizer step asks of an engine. Indices and lists refer to `spans`."""

    spans: list[Span]
    cuts: list[Tensor]
    """For every span, (n,) int64 on the CPU: the positions inside the whole tensor at which one rank's piece ends and
    another's begins. They follow from shapes and the number of ranks, and are the same on all of them."""
    calls_per_step: int
    """How often the engine calls the base optimizer in one step (DeepSpeed: once a parameter group or sub-group)."""

    def updating(self, optimizer: Optimizer) -> list[int]:
        """Return the spans that the call in progress updates.

        Raises:
            UserError: the spans do not lie where they lay at attach, and cannot be followed.
        """

    def gradients(self, indices: list[int]) -> list[Tensor]:
        """Return these spans' reduced gradients, of `Span.shape`; a missing gradient is created as zeros."""

    def squares(self, gradients: list[Tensor]) -> Tensor:
        """Return (2,) float32: this rank's sums of squares of these gradients, and of all of the whole step.

        Args:
            gradients: what `gradients` returned for the call in progress.
        """

    def all_reduce(self, buffer: Tensor) -> None:
        """Sum `buffer` in place over the ranks that hold different pieces."""

    def agree(self, squares: Tensor) -> None:
        """Make a step's (2,) sums of squared gradients, reduced above, the same on every rank, not finite on all where
        one rank's are not.

        Raises:
            UserError: ranks that must have the same gradients do not.
        """

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite `tensor` in place with one rank's, so that ranks cannot disagree."""

    def cancel(self, optimizer: Optimizer) -> None:
        """Make the call in progress change nothing: no weight, no moment."""

    def finish(self, optimizer: Optimizer) -> None:
        """Put back what `cancel` took away, after the call."""

    def publish(self) -> None:
        """Bring low-precision copies that the engine already made up to date with the master weights."""

    def missed_steps(self) -> int:
        """Return how many steps the engine dropped, before they reached the optimizer, since the last question."""

    def moments(self) -> list[list[Tensor]]:
        """Return, for every span, the optimizer's state that has one element a weight, of `Span.shape`."""


class StateFace(Protocol):
    """What checkpoints, saving and the guard ask of an engine, between two steps."""

    spans: list[Span]

    def trained(self) -> dict[str, nn.Parameter]:
        """Return name in the unwrapped model → parameter, of everything trained at attach (frozen since or not) or now.

        The parameters of attach are given: the model may hold others at the moment (FSDP2's gathered ones).
        """

    def pieces(self) -> list[Piece]:
        """Return what this rank's optimizer holds of every trained parameter, the adapters and others.

        Raises:
            Unsupported: the optimizer keeps state that cannot be cut.
        """

    def restore(self, states: Mapping[str, PieceState]) -> None:
        """Put optimizer state back: name of a parameter → state of this rank's piece of it.

        Raises:
            Unsupported: this engine cannot hold that state.
        """

    def write(self, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Overwrite trainable parameters with whole values, in the masters and in every copy the engine made of them.

        On every rank with the same values.
        """

    def refresh(self) -> None:
        """Bring every copy that the engine made of the master weights up to date; a collective call."""

    def replicas(self) -> tuple[list[tuple[str, Tensor]], dist.ProcessGroup | None]:
        """Return named tensors that must be equal on several ranks, and those ranks (None: all)."""


class Sharding(StepFace, StateFace, Protocol):
    """An engine's hold of a live model and its optimizer."""

    def connect(self) -> None:
        """Learn where the other ranks' spans lie; a collective call, once, after every rank could make its own."""

    def probe(self, *, write: bool) -> str | None:
        """Compare spans with the values that the forward computes with; return the name of one that differs, or None.

        A collective call between two steps; ranks may answer differently (`engines/probing.py`).

        Args:
            write: also see numbers written into the spans arrive in the forward, and put the weights back.
        """


def adapter_tensors(model: nn.Module) -> list[tuple[AdapterTensor, nn.Parameter]]:
    """Return every adapter tensor with its parameter, ordered by (layer, factor) with factors as in `FACTORS`."""
    result = []
    matrix = triplet = 0
    for index, (name, layer) in enumerate(adapter_layers(model)):
        if layer.r:  # else built without triplets after the final allocation
            for factor, rows in zip(FACTORS, (layer.in_features, 1, layer.out_features), strict=True):
                tensor = AdapterTensor(index, name, factor, rows, layer.r, layer.matrices, matrix, triplet)
                result.append((tensor, getattr(layer, factor)))
        matrix += layer.matrices
        triplet += layer.matrices * layer.r
    return result


class LiveAdapters:
    """The parameters that the adapter layers hold at the moment, without walking through the model again.

    Args:
        model: the model with AdaLoRA layers.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = [layer for _, layer in adapter_layers(model) if layer.r > 0]
        self._slots = [(layer, factor) for layer in layers for factor in FACTORS]

    def parameters(self) -> list[nn.Parameter]:
        """Return them in the order of `adapter_tensors`."""
        try:  # past Module.__getattr__, which costs more than all that is then compared
            return [cast(nn.Parameter, layer._parameters[factor]) for layer, factor in self._slots]
        except KeyError:  # somebody's parametrization took its place
            return [getattr(layer, factor) for layer, factor in self._slots]


def check_held(tensors: list[tuple[AdapterTensor, nn.Parameter]], optimizer: Optimizer) -> None:
    """Refuse an optimizer that would leave an adapter untrained.

    Raises:
        UserError: `optimizer` does not hold one of the parameters.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for tensor, parameter in tensors:
        if id(parameter) not in held:
            raise UserError(
                f"the optimizer does not hold '{tensor.name}'. Build the optimizer after inject_adalora (and after "
                f"fully_shard), from the parameters with requires_grad=True."
            )


def no_cuts(spans: Sequence[Span]) -> list[Tensor]:
    """Return `StepFace.cuts` of spans that hold whole rows only, on every rank."""
    return [torch.zeros(0, dtype=torch.int64, device="cpu") for _ in spans]
