"""What an optimizer keeps of one trained parameter: the view of it that checkpoints read and write.

Engines differ only in where the pieces lie; what an optimizer's state looks like is the same everywhere. State is
either one element a weight (Adam's moments) and can be cut like the weight, or one number a parameter (its step count).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from adalora_scale.adalora.injection import injected_module, plain_name
from adalora_scale.errors import Unsupported, UserError


@dataclass(frozen=True)
class Piece:
    """This rank's contiguous row-major piece of a trained parameter, adapter or not."""

    name: str
    """Name in the unwrapped model."""
    start: int
    weight: Tensor
    """(length,) view of the float32 master weight; may be empty."""
    state: dict[str, Tensor]
    """Optimizer state with one element a weight: name → (length,) view."""
    scalars: dict[str, float]
    """Optimizer state with one number a parameter."""
    copies: tuple[int, int] = (0, 1)
    """(which, of how many) ranks that hold this very piece."""


@dataclass(frozen=True)
class PieceState:
    """Optimizer state to put back for a piece, named as in `Piece`."""

    state: Mapping[str, Tensor]
    scalars: Mapping[str, float]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return name in the unwrapped model → parameter, of every parameter that requires a gradient."""
    root = injected_module(model) or model
    return {plain_name(name): p for name, p in root.named_parameters() if p.requires_grad}


def whole_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Return a parameter's shape, whoever holds the pieces."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def direct_pieces(trained: Mapping[str, nn.Parameter], optimizer: Optimizer) -> list[Piece]:
    """Return the pieces of parameters that the torch optimizer holds as they are: one process, DDP, FSDP2, HSDP."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    pieces = []
    for name, parameter in trained.items():
        if id(parameter) not in held:
            continue
        start, copies = 0, (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            _, offset = compute_local_shape_and_global_offset(parameter.shape, mesh, placements)
            start = offset[0] * math.prod(parameter.shape[1:]) if offset else 0
            which, count = 0, 1
            for dim, placement in enumerate(placements):
                if isinstance(placement, Replicate):
                    which, count = which * mesh.size(dim) + mesh.get_local_rank(dim), count * mesh.size(dim)
            copies = which, count
        weight = local(parameter.detach()).view(-1)
        state, scalars = split_state(optimizer, parameter)
        flat = {kind: local(value).view(-1) for kind, value in state.items()}
        pieces.append(Piece(name, start if weight.numel() else 0, weight, flat, scalars, copies))
    return pieces


def require_float32(trained: Mapping[str, nn.Parameter], held: list[nn.Parameter]) -> None:
    """Refuse a trained parameter that the torch optimizer holds in another dtype: there are no masters behind it.

    Raises:
        UserError: naming the parameter.
    """
    names = {id(parameter): f"'{name}'" for name, parameter in trained.items()}
    for parameter in held:
        if parameter.requires_grad and parameter.is_floating_point() and parameter.dtype != torch.float32:
            name = names.get(id(parameter), f"a parameter of shape {tuple(parameter.shape)} in the optimizer")
            raise UserError(
                f"{name} is trained as {parameter.dtype}, in which most updates round to nothing and no checkpoint can "
                f"be written: name its module in adalora.modules_to_save (trained in float32), or make it float32 "
                f"before the optimizer."
            )


def split_state(optimizer: Optimizer, parameter: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return a parameter's optimizer state: tensors of the parameter's shape, and single numbers.

    Raises:
        Unsupported: the optimizer keeps something that is neither (8-bit codes, factored moments).
    """
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, float] = {}
    # A number's step count has the number's own shape; what has a matrix's shape is one element a weight.
    cut = _kinds_of_weights(optimizer) if parameter.dim() == 0 else None
    for key, value in optimizer.state.get(parameter, {}).items():
        whole = isinstance(value, Tensor) and value.shape == parameter.shape and value.dtype == torch.float32
        if whole and (cut is None or key in cut):
            tensors[key] = value
        elif isinstance(value, int | float) or (isinstance(value, Tensor) and value.numel() == 1):
            scalars[key] = float(value)
        elif value is not None:
            raise Unsupported(
                f"{type(optimizer).__name__} keeps '{key}' ({_described(value)}), which is not cut like weights; use "
                f"training.optim=adamw_torch for checkpoints that can be resumed."
            )
    return tensors, scalars


def _kinds_of_weights(optimizer: Optimizer) -> set[str]:
    """Name the state that has one element a weight, from the parameters that are no single numbers."""
    return {
        key
        for parameter, state in optimizer.state.items()
        if parameter.dim()
        for key, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }


def _described(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


@torch.no_grad()
def make_state(optimizer: Optimizer, parameter: Tensor, kinds: list[str], scalars: Mapping[str, float]) -> None:
    """Give a parameter the state that the optimizer makes at its first step: tensors to be filled, numbers set."""
    state = optimizer.state[parameter]
    for kind in kinds:
        if not isinstance(state.get(kind), Tensor):
            state[kind] = torch.zeros_like(parameter)
    for key, value in scalars.items():
        found = state.get(key)
        if isinstance(found, Tensor):
            found.fill_(value)
        elif type(optimizer).__module__.startswith("torch.optim"):
            on_device = any(g.get("fused") or g.get("capturable") for g in optimizer.param_groups)
            state[key] = torch.tensor(value, dtype=torch.float32, device=parameter.device if on_device else None)
        else:  # DeepSpeed's FusedAdam and DeepSpeedCPUAdam count in integers
            state[key] = int(value) if value.is_integer() else value


@torch.no_grad()
def restore_direct(trained: Mapping[str, nn.Parameter], optimizer: Optimizer, states: Mapping[str, PieceState]) -> None:
    """Put optimizer state back where `direct_pieces` found it."""
    for name, parameter in trained.items():
        if name in states:
            given = states[name]
            make_state(optimizer, parameter, list(given.state), given.scalars)
            for kind, value in given.state.items():
                local(optimizer.state[parameter][kind]).view(-1).copy_(value)


Place = tuple[int, int, int, int]
"""(flat partition, offset in it, start in the tensor, length) of a piece."""


def flat_pieces(flats: list[Tensor], placed: Mapping[str, Place], optimizer: Optimizer) -> list[Piece]:
    """Return pieces that are views into flat partitions: ZeRO."""
    states = [split_state(optimizer, flat) for flat in flats]
    found = []
    for name, (group, offset, start, length) in placed.items():
        part = slice(offset, offset + length)
        state, scalars = states[group]
        views = {kind: value.view(-1)[part] for kind, value in state.items()}
        found.append(Piece(name, start, flats[group].detach()[part], views, scalars))
    return found


@torch.no_grad()
def restore_flat(
    flats: list[Tensor], placed: Mapping[str, Place], optimizer: Optimizer, states: Mapping[str, PieceState]
) -> None:
    """Put optimizer state back where `flat_pieces` found it.

    Raises:
        Unsupported: parameters of one partition took different numbers of steps.
    """
    for index, flat in enumerate(flats):
        own = [(place, states[name]) for name, place in placed.items() if place[0] == index and name in states]
        if not own:
            continue
        make_state(optimizer, flat, list(own[0][1].state), common_scalars([given for _, given in own]))
        for (_, offset, _, length), given in own:
            for kind, value in given.state.items():
                optimizer.state[flat][kind].view(-1)[offset : offset + length].copy_(value)


def common_scalars(states: list[PieceState]) -> dict[str, float]:
    """Return the numbers that all parameters of one flat partition share.

    Raises:
        Unsupported: they differ.
    """
    first = dict(states[0].scalars) if states else {}
    for other in states:
        if dict(other.scalars) != first:
            raise Unsupported(
                f"parameters of one flat partition took different numbers of steps ({first}, {dict(other.scalars)}); "
                f"resume on the engine that wrote the checkpoint."
            )
    return first


def local(tensor: Any) -> Tensor:
    """Return this rank's piece of a DTensor, and any other tensor as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
