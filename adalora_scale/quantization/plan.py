"""What goes where: every parameter of a model on the meta device beside the tensor of the checkpoint that fills it.

Everything that can be wrong with a checkpoint is found here, from headers alone, before memory fills.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adalora_scale.errors import Unsupported, UserError
from adalora_scale.quantization.base_files import FLOATS, BaseFiles
from adalora_scale.quantization.called import weights_read
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.quantization.linear import Linear4bit, quantization_targets, replace_linears
from adalora_scale.quantization.memory import PIECE, row_pieces
from adalora_scale.quantization.naming import Names, match_names
from adalora_scale.quantization.prequantized import check_stored, stored_spec
from adalora_scale.quantization.spec import QuantSpec


@dataclass(frozen=True)
class Slot:
    """One tensor to fill: attribute `leaf` of `module`, which stays the same object when engines shard it."""

    name: str
    module: nn.Module
    leaf: str
    source: str
    """Tensor of the checkpoint, or of its `fused` ones."""
    parts: dict[str, str] = field(default_factory=dict)
    """bitsandbytes' quantisation state of a weight that is stored in 4 bits."""

    @property
    def quantized(self) -> bool:
        """Whether this is the weight of a 4-bit layer (its scales are filled with it)."""
        return isinstance(self.module, Linear4bit | ExpertLinear4bit) and self.leaf == "weight"


@dataclass
class LoadingPlan:
    """How a model is filled from a checkpoint."""

    checkpoint: BaseFiles
    dtype: torch.dtype
    """Dtype of weights that are not quantised, and of those that are before quantisation."""
    slots: list[Slot]
    fresh: list[tuple[nn.Module, nn.Module]]
    """(module, the same on the meta device) of modules that the checkpoint does not hold: new heads."""
    ties: list[list[tuple[nn.Module, str]]]
    """Places that share one parameter."""
    ignored: list[str]
    """Tensors of the checkpoint that belong to another head."""
    added: dict[str, Tensor] = field(default_factory=dict)
    """Rows that a tensor has behind the checkpoint's, by the slot's name."""

    @property
    def stored_in_4bit(self) -> bool:
        """Whether the checkpoint is in 4 bits already."""
        return any(slot.parts for slot in self.slots)


def make_plan(
    model: nn.Module,
    checkpoint: BaseFiles,
    *,
    dtype: torch.dtype,
    spec: QuantSpec | None,
    compute_dtype: torch.dtype = torch.bfloat16,
    skip_modules: list[str] | None = None,
    new_heads: Sequence[str] = (),
    grown: Mapping[str, int] | None = None,
) -> LoadingPlan:
    """Put 4-bit layers into `model` and say how every parameter is filled.

    Args:
        model: a transformers model with its parameters on the meta device, without adapters; where its experts are to
            be in 4 bits, split (`split_all_experts`).
        checkpoint: what it is loaded from. Weights stored in 4 bits become Linear4bit whatever `spec` says.
        dtype: of what is not quantised.
        spec: options of the weights to quantise while loading; None quantises nothing.
        compute_dtype: of weights that are stored in 4 bits.
        skip_modules: modules that stay in `dtype`.
        new_heads: modules that may be missing in the checkpoint and are then initialised as transformers does.
        grown: rows that the checkpoint has of tensors that have more in the model; the others go to `added`.

    Raises:
        UserError: tensors are missing, unexpected or have another shape; a weight cannot be quantised.
        Unsupported: a tensor would have to be converted while loading.
    """
    names = match_names(model, checkpoint.tensors)
    checkpoint.fuse(names.fused)
    _put_layers(model, checkpoint, names, spec, compute_dtype, skip_modules or [], new_heads)
    _untie_what_differs(model, checkpoint, names)
    ties = _ties(model)
    twins = {name: group for group in _tied_names(model) for name in group}
    fresh = [head for head in new_heads if not _holds_any(names, head)]
    slots: list[Slot] = []
    missing: list[str] = []
    filled: set[str] = set()
    for name, module, leaf, tensor in _own_tensors(model):
        if leaf in ("scales", "nested") and isinstance(module, Linear4bit | ExpertLinear4bit):
            continue
        if _inside(name, fresh) or filled.intersection(twins.get(name, ())):
            continue
        source = names.tensors.get(name)
        if source is None:
            if not any(twin in names.tensors for twin in twins.get(name, ())):
                missing.append(name)
            continue
        filled.add(name)
        slot = Slot(name, module, leaf, source, names.states.get(name, {}))
        _check(slot, tensor, checkpoint, (grown or {}).get(name))
        slots.append(slot)
    if missing:
        raise UserError(
            f"the checkpoint lacks {_listed(missing)} of {type(model).__name__}; {_fits}. A classifier's new layers "
            f"are named in adalora.modules_to_save."
        )
    unexpected, ignored = _sort_unexpected(model, names.unexpected, fresh)
    if unexpected:
        raise UserError(f"the checkpoint holds {_listed(unexpected)}, which {type(model).__name__} has not; {_fits}.")
    heads = [(model.get_submodule(name), copy.deepcopy(model.get_submodule(name))) for name in fresh]
    return LoadingPlan(checkpoint, dtype, slots, heads, ties, ignored)


def absent_tensors(model: nn.Module, checkpoint: BaseFiles) -> list[str]:
    """Name the parameters and persistent buffers of a model without adapters that a checkpoint does not hold.

    Raises:
        Unsupported: a tensor would have to be converted while loading.
    """
    names = match_names(model, checkpoint.tensors).tensors
    twins = {name: group for group in _tied_names(model) for name in group}
    return [name for name, *_ in _own_tensors(model) if not any(twin in names for twin in twins.get(name, {name}))]


_fits = "use a config.json and weights that belong together"


def _put_layers(
    model: nn.Module,
    checkpoint: BaseFiles,
    names: Names,
    spec: QuantSpec | None,
    compute_dtype: torch.dtype,
    skip: list[str],
    new_heads: Sequence[str],
) -> None:
    if names.states:
        read = weights_read(model)
        for weight, parts in names.states.items():
            if weight not in names.tensors or not weight.endswith(".weight"):
                raise UserError(f"the checkpoint holds a 4-bit state of '{weight}' but not its weight; {_fits}.")
            own, shape = stored_spec(checkpoint, weight, parts, compute_dtype)
            layer = weight.removesuffix(".weight")
            if layer in read:
                raise Unsupported(f"the checkpoint holds '{layer}' in 4 bits, but {read[layer]}; load a 16-bit one.")
            replace_linears(model, own, [layer])
            new = model.get_submodule(layer)
            if shape != _matrices(new):
                raise UserError(f"the checkpoint's '{weight}' is {shape}, which does not fit the model; {_fits}.")
        return
    if spec is None:
        return
    replace_linears(model, spec, quantization_targets(model, [*skip, *new_heads]))


def _matrices(layer: nn.Module) -> tuple[int, ...] | None:
    """Return the shape that the state of a 4-bit layer's stored weight has."""
    if isinstance(layer, ExpertLinear4bit):
        return layer.experts, layer.out_features, layer.in_features
    return (layer.out_features, layer.in_features) if isinstance(layer, Linear4bit) else None


def _untie_what_differs(model: nn.Module, checkpoint: BaseFiles, names: Names) -> None:
    """Keep weights apart that config.json ties but the files hold with different values, as transformers does."""
    places = {name: (module, leaf) for name, module, leaf, _ in _own_tensors(model)}
    for group in _tied_names(model):
        first, *others = sorted((name for name in group if name in names.tensors), key=list(places).index) or [""]
        for name in others:
            if not _same_values(checkpoint, names.tensors[first], names.tensors[name]):
                module, leaf = places[name]
                tied = module._parameters[leaf]
                if tied is not None:
                    module._parameters[leaf] = nn.Parameter(torch.empty_like(tied), requires_grad=tied.requires_grad)


def _same_values(checkpoint: BaseFiles, first: str, second: str) -> bool:
    one, other = checkpoint.stored(first), checkpoint.stored(second)
    if one.shape != other.shape or not one.shape:
        return one.shape == other.shape
    pieces = row_pieces(0, one.shape[0], math.prod(one.shape[1:]), PIECE)
    return all(torch.equal(checkpoint.rows(first, a, b), checkpoint.rows(second, a, b)) for a, b in pieces)


def _own_tensors(model: nn.Module) -> list[tuple[str, nn.Module, str, Tensor]]:
    """List (name, module, leaf, tensor) of parameters and persistent buffers, in module order."""
    found = []
    for prefix, module in model.named_modules():
        own = dict(module._parameters) | {
            leaf: buffer for leaf, buffer in module._buffers.items() if leaf not in module._non_persistent_buffers_set
        }
        for leaf, tensor in own.items():
            if tensor is not None:
                found.append((f"{prefix}.{leaf}" if prefix else leaf, module, leaf, tensor))
    return found


def _tied_names(model: nn.Module) -> list[set[str]]:
    groups: dict[int, set[str]] = {}
    for name, _, _, tensor in _own_tensors(model):
        groups.setdefault(id(tensor), set()).add(name)
    return [group for group in groups.values() if len(group) > 1]


def _ties(model: nn.Module) -> list[list[tuple[nn.Module, str]]]:
    groups: dict[int, list[tuple[nn.Module, str]]] = {}
    for _, module, leaf, tensor in _own_tensors(model):
        groups.setdefault(id(tensor), []).append((module, leaf))
    return [group for group in groups.values() if len(group) > 1]


def _check(slot: Slot, tensor: Tensor, checkpoint: BaseFiles, rows: int | None) -> None:
    stored = checkpoint.stored(slot.source)
    layer = slot.module
    if slot.parts and isinstance(layer, Linear4bit | ExpertLinear4bit):
        experts = layer.experts if isinstance(layer, ExpertLinear4bit) else None
        check_stored(checkpoint, slot.source, slot.parts, layer.spec, layer.weight.shape[0], experts)
        return
    sides = _matrices(layer) if slot.quantized else None
    if sides is not None:
        turned = layer.transposed
        shape: tuple[int, ...] = (*sides[:-2], sides[-1], sides[-2]) if turned else sides
    else:
        shape = tuple(tensor.shape) if rows is None else (rows, *tensor.shape[1:])
    if stored.shape != shape:
        raise UserError(f"'{slot.source}' has shape {stored.shape} in {stored.file.name}, the model {shape}; {_fits}.")
    if stored.dtype not in FLOATS and (tensor.is_floating_point() or slot.quantized):
        raise UserError(
            f"'{slot.source}' in {stored.file.name} is {stored.dtype}; weights must be stored as "
            f"{', '.join(FLOATS)}, or in 4 bits with bitsandbytes' state beside them."
        )


def _sort_unexpected(model: nn.Module, unexpected: list[str], fresh: list[str]) -> tuple[list[str], list[str]]:
    """Tell what nobody expects from another task's head, which a model with a new head leaves behind."""
    base = getattr(model, "base_model_prefix", "")
    if not fresh or not base:
        return unexpected, []
    inside = [name for name in unexpected if name.startswith(f"{base}.")]
    return inside, [name for name in unexpected if not name.startswith(f"{base}.")]


def _holds_any(names: Names, module: str) -> bool:
    return any(_inside(name, [module]) for name in names.tensors)


def _inside(name: str, modules: Sequence[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def _listed(names: list[str]) -> str:
    rest = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(f"'{name}'" for name in names[:3]) + rest
