"""Where a base model's checkpoint holds its experts: one tensor for all of them, or one an expert and projection.

transformers stacks an expert's tensors while loading (`conversion_mapping`: MergeModulelist, then Concatenate of gate
and up). What a tensor of the checkpoint is of the stack follows from its pattern: which expert, and which equal part of
the projection's rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from adalora_scale.adalora.matrices import layer_of_matrix
from adalora_scale.experts.modules import is_experts, lies_input_first, projections


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


def expert_place(model: nn.Module, matrix: str) -> ExpertPlace | None:
    """Return where a model has an expert's matrix, by the name that `matrix_names` gave it; None for other names."""
    found = layer_of_matrix(matrix)
    if found is None:
        return None
    parameter, number = found
    parent, _, leaf = parameter.rpartition(".")
    module = dict(model.named_modules()).get(parent)
    if module is None or not is_experts(module) or leaf not in projections(module):
        return None
    experts, first, second = getattr(module, leaf).shape
    if number >= experts:
        return None
    input_first = lies_input_first(module)
    return ExpertPlace(parameter, number, (first, second) if input_first else (second, first), input_first)


def expert_part(key: str, converters: Iterable[WeightConverter]) -> ExpertPart | None:
    """Return what a tensor of the checkpoint is of a stack of experts; None where it is converted otherwise."""
    for converter in converters:
        stacking, *joining = converter.operations
        if not isinstance(stacking, MergeModulelist) or stacking.dim != 0:
            continue
        if any(not isinstance(operation, Concatenate) or operation.dim != 1 for operation in joining):
            continue
        for part, pattern in enumerate(converter.source_patterns):
            match = re.search(re.escape(pattern).replace(r"\*", r"(\d+)") + "$", key)
            if match is not None and match.groups():
                return ExpertPart(int(match[1]), part)
    return None
