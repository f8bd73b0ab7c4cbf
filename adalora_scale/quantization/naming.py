"""Which tensor of a checkpoint belongs to which parameter of a model, by transformers' own rules.

Old checkpoints have other names, base models lack the head's prefix; transformers renames while loading, and so does
this. Experts that transformers joins into one tensor are found part by part (`fused`). What else transformers would
compute anew (permuted rows, for one) is refused by name: a slice of the result is not a slice of the source.

`split_experts` gives experts' tensors names of their own (`gate_up_proj.weight`), which no checkpoint has: they are
looked for under the names that they had.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, apply_renamings, rename_source_key

from adalora_scale.errors import Unsupported, UserError
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.quantization.fused import Collected, Parts, place_of

_QUANT_STATE = re.compile(r"^(?P<weight>.+)\.(?P<suffix>absmax|quant_map|nested_absmax|nested_quant_map|nested_offset|"
                          r"quant_state\.bitsandbytes__(?:nf4|fp4))$")  # fmt: skip


@dataclass
class Names:
    """A checkpoint's tensors under the names of the model's parameters."""

    tensors: dict[str, str] = field(default_factory=dict)
    """Parameter or buffer -> tensor of the checkpoint; the name of one in `fused` is its name in plain transformers."""
    fused: dict[str, Parts] = field(default_factory=dict)
    """Tensor that the checkpoint holds expert by expert -> its parts (see `BaseFiles.fuse`)."""
    states: dict[str, dict[str, str]] = field(default_factory=dict)
    """4-bit weight -> part of bitsandbytes' quantisation state -> tensor of the checkpoint."""
    unexpected: list[str] = field(default_factory=list)
    """Tensors that the model has no place for, under the model's names."""


def match_names(model: nn.Module, stored: Iterable[str]) -> Names:
    """Match the names of a checkpoint with those of a transformers model (on any device, without adapters).

    Raises:
        Unsupported: a tensor has to be converted while loading.
        UserError: the parts of a tensor over experts are incomplete.
    """
    transforms = get_model_conversion_mapping(model)  # type: ignore[arg-type]
    converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
    renamings = [transform for transform in transforms if not isinstance(transform, WeightConverter)]
    own = checkpoint_names(model)
    prefix = getattr(model, "base_model_prefix", None) or None
    ignored = [re.compile(pattern) for pattern in _ignored_patterns(model)]
    names = Names()
    collected: dict[str, Collected] = {}
    for key in stored:
        state = _QUANT_STATE.match(key)
        weight = state["weight"] if state else key
        name, converted = rename_source_key(weight, renamings, converters, prefix, own)  # type: ignore[arg-type]
        if name not in own and weight in own:  # a renaming meant another tensor: DeepSeek-V4's last norm
            name, converted = rename_source_key(weight, [], [], prefix, own)
        if converted is not None:
            converter = next(each for each in converters if converted in each.source_patterns)
            place = place_of(converter, converted, apply_renamings(weight, renamings))  # type: ignore[arg-type]
            if place is None or state or name not in own:
                raise _not_by_slices(model, key, converted, name, in_4bit=state is not None)
            collected.setdefault(name, Collected(len(converter.source_patterns))).add(*place, key)
        elif state:
            names.states.setdefault(own.get(name, name), {})[state["suffix"]] = key
        elif name in own:
            names.tensors[own[name]] = key
        elif not any(pattern.search(name) for pattern in ignored):
            names.unexpected.append(name)
    for name, parts in collected.items():
        if own[name] in names.tensors:
            raise UserError(f"the checkpoint holds '{name}' twice, whole and expert by expert; download it again.")
        names.fused[name] = parts.parts()
        names.tensors[own[name]] = name
    return names


def checkpoint_names(model: nn.Module) -> dict[str, str]:
    """Return name in a checkpoint of plain transformers → name in the model, of its parameters and buffers."""
    own = {name: name for name, _ in model.named_parameters(remove_duplicate=False)}
    own |= {name: name for name in model.state_dict()}
    for name, module in model.named_modules():
        if isinstance(module, ExpertLinear | ExpertLinear4bit):
            for leaf in ("weight", "bias"):
                if getattr(module, leaf) is not None:
                    full = f"{name}.{leaf}"
                    own[stored_name(module, leaf, full)] = own.pop(full)
    return own


def stored_name(module: nn.Module, leaf: str, name: str) -> str:
    """Return the name that a checkpoint of plain transformers has for attribute `leaf` of `module`, in all `name`."""
    if not isinstance(module, ExpertLinear | ExpertLinear4bit):
        return name
    return name.removesuffix(f".{leaf}") + ("" if leaf == "weight" else f"_{leaf}")


def _not_by_slices(model: nn.Module, key: str, pattern: str, name: str, *, in_4bit: bool) -> Unsupported:
    if in_4bit:
        return Unsupported(
            f"'{key}': the checkpoint holds single experts in 4 bits, each part of '{name}' with a second level of its "
            f"own; load the 16-bit checkpoint, or one that adalora-scale quantize wrote from it."
        )
    return Unsupported(
        f"'{key}' has to be converted while loading ({type(model).__name__}: {pattern} becomes '{name}'), "
        f"which slices cannot be; the model trains over its 16-bit weights (model.load_in_4bit=false)."
    )


def _ignored_patterns(model: nn.Module) -> list[str]:
    """Return what transformers drops on purpose: see PreTrainedModel._adjust_missing_and_unexpected_keys."""
    patterns = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    buffers = [name for name, _ in model.named_buffers()]
    if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
        patterns.append(r"rotary_emb\.inv_freq")
    if any(name.endswith("position_ids") for name in buffers):
        patterns.append(r"(^|\.)position_ids$")
    return patterns
