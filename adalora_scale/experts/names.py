"""Names of experts' parameters: as transformers has them, and as they are once an experts module is split."""

from __future__ import annotations

import re

from torch import nn

from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import PROJECTIONS

_SPLIT = re.compile(rf"(.*\.(?:{'|'.join(PROJECTIONS)}))\.(weight|bias)")
_DIMENSIONS = {"weight": 3, "bias": 2}


def joined_name(name: str, dimensions: int) -> str:
    """Return the name that an experts' parameter has unsplit (`….gate_up_proj`, `….gate_up_proj_bias`).

    Args:
        name: of a parameter, in a model with its experts split; other names come back as they are.
        dimensions: of the parameter, which tell an expert's projection from a dense layer of the same name.
    """
    match = _SPLIT.fullmatch(name)
    if match is None or dimensions != _DIMENSIONS[match[2]]:
        return name
    return match[1] if match[2] == "weight" else f"{match[1]}_bias"


def split_name(model: nn.Module, name: str) -> str:
    """Return the name that a parameter has in a model with its experts split; others come back as they are."""
    for projection, leaf in ((name, "weight"), (name.removesuffix("_bias"), "bias")):
        try:
            if isinstance(model.get_submodule(projection), ExpertLinear):
                return f"{projection}.{leaf}"
        except AttributeError:
            continue
    return name
