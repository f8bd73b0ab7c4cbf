"""Which tensor of a checkpoint belongs to which parameter of a model, by transformers' own rules.

Old checkpoints have other names, base models lack the head's prefix; transformers renames while loading, and so does
this. What transformers would compute anew from several tensors (merged experts, permuted rows) is refused by name: a
slice of the result is not a slice of the source.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key

from adalora_scale.errors import Unsupported

_QUANT_STATE = re.compile(r"^(?P<weight>.+)\.(?P<suffix>absmax|quant_map|nested_absmax|nested_quant_map|"
                          r"quant_state\.bitsandbytes__(?:nf4|fp4))$")  # fmt: skip


@dataclass
class Names:
    """A checkpoint's tensors under the names of the model's parameters."""

    tensors: dict[str, str] = field(default_factory=dict)
    """Parameter or buffer -> tensor of the checkpoint."""
    states: dict[str, dict[str, str]] = field(default_factory=dict)
    """4-bit weight -> part of bitsandbytes' quantisation state -> tensor of the checkpoint."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors that the model has no place for, under the model's names."""


def match_names(model: nn.Module, stored: Iterable[str]) -> Names:
    """Match the names of a checkpoint with those of a transformers model (on any device, without adapters).

    Raises:
        Unsupported: a tensor has to be converted while loading.
    """
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    own = {name: True for name, _ in model.named_parameters(remove_duplicate=False)}
    own |= {name: True for name in model.state_dict()}
    prefix = getattr(model, "base_model_prefix", None) or None
    ignored = [re.compile(pattern) for pattern in _ignored_patterns(model)]
    names = Names()
    for key in stored:
        state = _QUANT_STATE.match(key)
        weight = state["weight"] if state else key
        name, converted = rename_source_key(weight, renamings, converters, prefix, own)  # type: ignore[arg-type]
        if converted is not None:
            raise Unsupported(
                f"'{key}' has to be converted while loading ({type(model).__name__}: {converted} becomes '{name}'), "
                f"which slices cannot be; the model trains over its 16-bit weights (model.load_in_4bit=false)."
            )
        if state:
            names.states.setdefault(name, {})[state["suffix"]] = key
        elif name in own:
            names.tensors[name] = key
        elif not any(pattern.search(name) for pattern in ignored):
            names.unexpected.append(name)
    return names


def _ignored_patterns(model: nn.Module) -> list[str]:
    """Return what transformers drops on purpose: see PreTrainedModel._adjust_missing_and_unexpected_keys."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns
