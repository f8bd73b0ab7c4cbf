"""Whether PEFT puts a LoRA where its config says, and the config under which it does.

PEFT rewrites the targets of some architectures whose experts became one tensor in transformers 5: a target that ends in
gate_proj, up_proj, down_proj (w1, w2, w3, gate) is taken for an expert's, though it be a dense layer's or a shared
expert's, and its values are lost with a warning. A weight that is named in `target_parameters` is left where it is.
Nobody is asked for the names of such architectures: PEFT injects into the model without memory, and what it adapted is
read off. Source: peft/utils/transformers_weight_conversion.py `_convert_peft_config_moe` (0.19 to 0.21).
"""

from __future__ import annotations

import copy
import importlib.util
import math
import warnings
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

from adalora_scale.errors import Unsupported
from adalora_scale.messages import cause

WEIGHT = ".weight"
_NAME = "exported"

Wanted = Mapping[str, tuple[int, float]]
"""Matrix → (rank, scaling)."""


def placed_config(
    config: Mapping[str, Any], wanted: Wanted, model: nn.Module, others: Collection[str] = ()
) -> dict[str, Any]:
    """Return `config`, or one under which the installed PEFT adapts what is wanted; without PEFT, `config`.

    Args:
        config: a LoraConfig as JSON values, with `target_modules`.
        wanted: every matrix that must get an adapter, and no other.
        model: the base, on the meta device; it is not changed.
        others: tensors of modules that were trained in full, by their names in the model.

    Raises:
        Unsupported: PEFT adapts other matrices, or with another rank or scaling, in both forms; or it looks for whole
            modules that the adapter does not hold.
    """
    if importlib.util.find_spec("peft") is None or _difference(config, wanted, model, others) is None:
        return dict(config)
    by_leaf: dict[str, dict[str, tuple[int, float]]] = {}
    tensors = set(config.get("target_parameters") or [])
    for name, value in wanted.items():
        if name in tensors:
            continue
        by_leaf.setdefault(name.rpartition(".")[2], {})[name] = value
    moved: list[str] = []
    for group in by_leaf.values():
        alone = dict(config) | {"target_modules": list(group), "target_parameters": None}
        if _difference(alone, group, model) is not None:
            moved += group
    settled = _as_parameters(config, wanted, moved)
    if (difference := _difference(settled, wanted, model, others)) is not None:
        raise Unsupported(
            f"PEFT's LoRA does not hold this adapter on {type(model).__name__}: {difference}. Use --format merged."
        )
    return settled


def parameter_targets(config: Mapping[str, Any]) -> list[str]:
    """Return the matrices that a config names by their weights; experts' tensors are none."""
    named = config.get("target_parameters") or []
    return [name.removesuffix(WEIGHT) for name in named if name.endswith(WEIGHT)]


def _as_parameters(config: Mapping[str, Any], wanted: Wanted, moved: Iterable[str]) -> dict[str, Any]:
    """Name the matrices in `moved` by their weights; PEFT has no dropout for those, in any layer of the adapter."""
    there, tensors = set(moved), list(config.get("target_parameters") or [])

    def renamed(pattern: Mapping[str, Any]) -> dict[str, Any]:
        return {f"{name}{WEIGHT}" if name.removeprefix("^") in there else name: v for name, v in pattern.items()}

    return dict(config) | {
        "target_modules": [name for name in wanted if name not in there and name not in tensors],
        "target_parameters": [*tensors, *(f"{name}{WEIGHT}" for name in wanted if name in there)],
        "rank_pattern": renamed(config["rank_pattern"]),
        "alpha_pattern": renamed(config["alpha_pattern"]),
        "lora_dropout": 0.0,
    }


def _adapted(name: str, layer: object) -> str:
    """Return what a LoRA layer of PEFT's adapts: a module, or a tensor of one, which may be wrapped several times."""
    parameter = getattr(layer, "parameter_name", "weight")
    return name if parameter == "weight" else f"{name.replace('.base_layer', '')}.{parameter}"


def _difference(
    config: Mapping[str, Any], wanted: Wanted, model: nn.Module, others: Collection[str] | None = None
) -> str | None:
    """Say what PEFT makes otherwise than wanted; None where it makes the same."""
    import peft
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    options = {key: copy.copy(value) for key, value in config.items() if key != "peft_type"}
    try:
        with warnings.catch_warnings():  # among them: patterns of weights match no module's name
            warnings.simplefilter("ignore")
            opened = peft.get_peft_model(
                copy.deepcopy(model), peft.LoraConfig(**options), adapter_name=_NAME, low_cpu_mem_usage=True
            )
    except Exception as error:  # whatever PEFT says, it does not adapt this
        return cause(error)
    adapted = opened.get_base_model()
    found = {
        _adapted(name, layer): (layer.r[_NAME], layer.scaling[_NAME])
        for name, layer in adapted.named_modules()
        if isinstance(layer, LoraLayer) and _NAME in layer.r
    }
    for name, (rank, scaling) in wanted.items():
        if name not in found:
            return f"'{name}' gets no adapter"
        rank_there, scaling_there = found[name]
        if rank_there != rank or not math.isclose(scaling_there, scaling, rel_tol=1e-6):
            return f"'{name}' gets rank {rank_there} and scaling {scaling_there:.3g}, not {rank} and {scaling:.3g}"
    if (more := next((name for name in found if name not in wanted), None)) is not None:
        return f"'{more}' gets an adapter too"
    if others is None:
        return None
    for name, module in adapted.named_modules():
        if isinstance(module, ModulesToSaveWrapper):
            whole = [f"{name}.{leaf}" for leaf in module.original_module.state_dict()]
            if (lacking := next((tensor for tensor in whole if tensor not in others), None)) is not None:
                return f"it takes '{name}' for a head, by its name, and the adapter does not hold '{lacking}'"
    return None
