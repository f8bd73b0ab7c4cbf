"""Experts of a 4-bit base by their values, one expert's matrix at a time: quantised as in training, or stored so.

Every expert has blocks and a second level of its own, over its whole (out_features, in_features) matrix. Where the
checkpoint holds a gate and what it gates as two tensors, the two are quantised as the one matrix that training had, and
each tensor gets its rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container
from dataclasses import dataclass

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from adalora_scale.errors import Unsupported, UserError
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import split_all_experts
from adalora_scale.export.base_checkpoint import BaseCheckpoint
from adalora_scale.export.tensor_files import DTYPE_NAMES, FLOATING
from adalora_scale.quantization import functional
from adalora_scale.quantization.naming import match_names
from adalora_scale.quantization.prequantized import (
    check_stored,
    stored_blocks,
    stored_dtype,
    stored_levels,
    stored_spec,
)
from adalora_scale.quantization.spec import QuantSpec

_Values = Callable[[int], Tensor]
"""Number of an expert → its (out_features, in_features) matrix, float32."""


@dataclass(frozen=True)
class StoredExperts:
    """A tensor of the checkpoint that holds experts in 4 bits, by its values."""

    dtype: str
    """Dtype of the merged tensor, the format's name: the one it had before it was quantised."""
    shape: tuple[int, ...]
    """Of the tensor: (experts, rows, columns), or of one expert's own."""
    load: Callable[[int], Tensor]
    """Returns what the tensor holds of an expert, by its number: (rows, columns) as they lie, float32."""


def copy_without_memory(model: nn.Module, *, split: bool) -> nn.Module:
    """Return a copy of a model on the meta device, its experts split or not."""
    with init_empty_weights(include_buffers=False):
        copied = copy.deepcopy(model)
    copied.tie_weights()  # type: ignore[operator]
    if split:
        split_all_experts(copied)
    return copied


def requantised_experts(
    base: BaseCheckpoint, model: nn.Module, spec: QuantSpec, dtype: torch.dtype, kept: Container[str]
) -> dict[str, StoredExperts]:
    """Return key of the checkpoint → values of the experts in it after quantisation as training did it.

    Args:
        base: a checkpoint that is not in 4 bits.
        model: its model with experts split (`copy_without_memory`).
        spec: the options that training had.
        dtype: of the weights before they were quantised.
        kept: projections (`model.layers.0.mlp.experts.down_proj`) that were not.

    Raises:
        UserError: experts differ in shape, or the block size does not divide one.
        Unsupported: the checkpoint's tensors are no weights.
    """
    names = match_names(model, base.checkpoint.tensors)
    base.checkpoint.fuse(names.fused)
    found: dict[str, StoredExperts] = {}
    for name, layer in model.named_modules():
        tensor = names.tensors.get(f"{name}.weight")  # what is missing is for the merge to say
        if not isinstance(layer, ExpertLinear) or name in kept or tensor is None:
            continue
        spec.blocks(layer.in_features, layer.out_features, name)
        shape = (layer.out_features, layer.in_features)

        def values(
            expert: int,
            tensor: str = tensor,
            name: str = name,
            shape: tuple[int, int] = shape,
            transposed: bool = layer.transposed,
        ) -> Tensor:
            flat = base.checkpoint.expert_weights(
                tensor, expert, 0, shape[0] * shape[1], in_features=shape[1], transposed=transposed
            )
            packed, scales, nested = functional.quantize(flat.view(shape).to(dtype), spec, name)
            return functional.dequantize(packed, scales, nested, spec, shape, torch.float32)

        found |= _by_tensor(base, name, layer, values)
    return found


def stored_experts(
    base: BaseCheckpoint, parameter: str, key: str, parts: dict[str, str], *, transposed: bool
) -> StoredExperts:
    """Return the values of a tensor of experts that the checkpoint stores in 4 bits.

    Args:
        base: the checkpoint.
        parameter, key: the model's name and the checkpoint's.
        parts: its state, as `match_names` found it.
        transposed: whether the model has it as (experts, in_features, out_features).

    Raises:
        UserError: the state does not fit the tensor.
        Unsupported: it was quantised with another code book.
    """
    checkpoint, own = base.checkpoint, tuple(base.parameters[parameter])
    spec, shape = stored_spec(checkpoint, parameter, parts, torch.float32)
    if own != ((shape[0], *shape[:0:-1]) if transposed and shape else shape):
        raise UserError(f"'{key}' in {base.directory} is {shape} in 4 bits and {own} in the model; get it again.")
    experts, rows, columns = shape
    blocks = spec.blocks(columns, rows, parameter)
    check_stored(checkpoint, key, parts, spec, experts * blocks, experts)

    def load(expert: int) -> Tensor:
        packed, scales = stored_blocks(checkpoint, key, parts, spec, expert * blocks, (expert + 1) * blocks)
        level = stored_levels(checkpoint, parts, expert, expert + 1)[0] if spec.double_quant else None
        absmax = functional.decode_expert_scales(scales, level)
        values = functional.dequantize_blocks(packed, absmax, spec, torch.float32).view(rows, columns)
        return values.T if transposed else values

    return StoredExperts(DTYPE_NAMES[getattr(torch, stored_dtype(checkpoint, parameter, parts))], own, load)


def projections_of(base: BaseCheckpoint) -> dict[str, ExpertLinear]:
    """Return the model's tensors of experts, by name, as layers without memory."""
    model = copy_without_memory(base.model, split=True)
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertLinear)}


def _by_tensor(base: BaseCheckpoint, name: str, layer: ExpertLinear, values: _Values) -> dict[str, StoredExperts]:
    """Give every tensor of the checkpoint that belongs to a projection its part of the values."""
    found = {}
    for source in base.sources:
        if source.parameter != name:
            continue
        entry, part = source.file.entries[source.key], source.expert
        if entry.dtype not in FLOATING:
            raise Unsupported(f"'{source.key}' is stored as {entry.dtype}; merge into the original 16-bit weights.")
        height = entry.shape[0]
        first = 0 if part is None else part.part * height

        def load(expert: int, first: int = first, height: int = height, whole: bool = part is None) -> Tensor:
            matrix = values(expert)
            if whole:
                return matrix.T if layer.transposed else matrix
            return matrix[first : first + height]

        found[source.key] = StoredExperts(entry.dtype, entry.shape, load)
    return found
