"""Where a base model's checkpoint holds its experts: one tensor for all of them, or one an expert and projection.

transformers stacks an expert's tensors while loading (`conversion_mapping`: MergeModulelist, then Concatenate of gate
and up). What a tensor of the checkpoint is of the stack follows from its pattern: which expert, and which equal part of
the projection's rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from adalora_scale.adalora.base_digest import sample_positions
from adalora_scale.adalora.matrices import layer_of_matrix
from adalora_scale.experts.modules import is_experts, lies_input_first, projections
from adalora_scale.export.tensor_files import FLOATING, TensorFile


@dataclass(frozen=True)
class ExpertPlace:
    """One expert's matrix of one projection, in the model."""

    parameter: str
    """The tensor of all experts."""
    number: int
    sides: tuple[int, int]
    """(in_features, out_features)."""
    input_first: bool
    """Whether the tensor is (experts, in, out)."""


@dataclass(frozen=True)
class ExpertPart:
    """What one tensor of the checkpoint, (rows, in_features), is of a stack of experts."""

    number: int
    """Of the expert."""
    part: int
    """Which of the equal parts of the projection's rows: 0 the gate's, 1 up's."""


def stacked_samples(
    parts: Mapping[tuple[int, int], tuple[TensorFile, str]], shape: Sequence[int]
) -> torch.Tensor | None:
    """Return what `tensor_samples` would of a stack of experts that the checkpoint holds in parts.

    Args:
        parts: (expert, part) → the file and the tensor's name in it.
        shape: (experts, out, in) of the stack.

    Returns:
        Its elements at `sample_positions`; None where a part is missing or no floating point.
    """
    experts, rows, columns = shape
    each = 1 + max(part for _, part in parts)
    whole = all(file.entries[key].dtype in FLOATING for file, key in parts.values())
    if not whole or len(parts) != experts * each or rows % each:
        return None
    height = rows // each
    found = []
    for position in sample_positions(experts * rows * columns):
        number, inside = divmod(position, rows * columns)
        row, column = divmod(inside, columns)
        file, key = parts[number, row // height]
        found.append(file.elements(key, [row % height * columns + column]))
    return torch.cat(found)


def expert_place(model: nn.Module, matrix: str) -> ExpertPlace | None:
    """Return where a model has an expert's matrix, by the name that `matrix_names` gave it; None for other names."""
    found = layer_of_matrix(matrix)
    if found is None:
        return None
    parameter, number = found
    parent, _, leaf = parameter.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        return None
    if not is_experts(module) or leaf not in projections(module):
        return None
    experts, first, second = getattr(module, leaf).shape
    if number >= experts:
        return None
    input_first = lies_input_first(module)
    return ExpertPlace(parameter, number, (first, second) if input_first else (second, first), input_first)
