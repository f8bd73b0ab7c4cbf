"""Several adapters beside one base in memory, of which one acts.

Each adapter is its own set of `AdaLoraLayer`s around the same base layers. The active set stands in the model; the
others are kept beside it and cost their factors alone. So nothing that looks at a model (engines, files, coverage) ever
meets two adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from torch import nn

from adalora_scale.adalora.injection import (
    Injection,
    adapter_layers,
    attach_injection,
    injected_module,
    injection_of,
    replace_modules,
)
from adalora_scale.adalora.layer import AdaLoraLayer
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.in_memory import require_no_training, require_unmerged, require_whole
from adalora_scale.export.stock_saving import save_adapter_alone


@dataclass
class _Aside:
    """An adapter that is not in the model."""

    layers: list[AdaLoraLayer]
    injection: Injection


def adapter_names(model: nn.Module) -> list[str]:
    """Return the names of a model's adapters, the active one first; none where it has no adapter.

    Args:
        model: with or without adapters, wrapped or not.
    """
    injection = injection_of(model)
    return [] if injection is None else [injection.name, *_others(model)]


def set_adapter(model: nn.Module, name: str) -> nn.Module:
    """Let another of the model's adapters act, in place, and return the model.

    Args:
        model: with adapters, as `inject_adalora` or `load_adapter` left it, held whole by this process.
        name: as `load_adapter` was given it, one of `adapter_names(model)`.

    Raises:
        UserError: there is none of that name, the active one is merged, or training is running.
        Unsupported: the model is sharded.
    """
    injection = _checked(model, "set_adapter")
    others = _others(model)
    if name == injection.name:
        return model
    if name not in others:
        raise _unknown(model, "set_adapter", name)
    chosen = others.pop(name)
    others[injection.name] = _put_aside(model)
    _put_in(model, chosen)
    return model


def delete_adapter(model: nn.Module, name: str) -> nn.Module:
    """Forget an adapter that does not act, in place, and return the model.

    Args:
        model: with adapters, as `inject_adalora` or `load_adapter` left it, held whole by this process.
        name: one of `adapter_names(model)` but the first, which is active.

    Raises:
        UserError: there is none of that name, or it is the active one.
    """
    others = _others(model)
    if name in adapter_names(model)[:1]:
        raise UserError(
            f"delete_adapter: '{name}' is the active adapter; set_adapter(model, another) first; unload(model) "
            f"takes all of them out."
        )
    if name not in others:
        raise _unknown(model, "delete_adapter", name)
    del others[name]
    return model


def load_beside(model: nn.Module, name: str, load: Callable[[nn.Module], None]) -> None:
    """Put an adapter beside those of a model; the active one stays it.

    Args:
        model: with an adapter.
        name: of the new one.
        load: puts the new one onto the base.

    Raises:
        UserError: the name is taken, the active one is merged, or training is running.
        Unsupported: the model is sharded, or an adapter has modules that were trained in full.
    """
    injection = _checked(model, "load_adapter")
    if name in adapter_names(model):
        raise UserError(
            f"load_adapter: the model already has an adapter '{name}'; give adapter_name=… another name to load this "
            f"one beside it, or delete_adapter or unload(model) first."
        )
    root, others = injected_module(model) or model, _others(model)
    if injection.config.modules_to_save:
        refuse_trained_modules(injection.config.modules_to_save)
    active = _put_aside(root)
    try:
        load(root)
        added = injection_of(root)
        if added is not None:
            added.name = name
            others[name] = _put_aside(root)
    finally:
        if injection_of(root) is not None:
            _put_aside(root)
        _put_in(root, active)


def _checked(model: nn.Module, call: str) -> Injection:
    injection = injection_of(model)
    if injection is None:
        raise UserError(f"{call}: the model has no AdaLoRA layers; load_adapter(model, folder) first.")
    require_whole(model, call)
    require_unmerged(model, call)
    require_no_training(model, call)
    return injection


def _others(model: nn.Module) -> dict[str, _Aside]:
    root = injected_module(model) or model
    found: dict[str, _Aside] = vars(root).setdefault("adalora_adapters", {})
    return found


def _put_aside(model: nn.Module) -> _Aside:
    """Take the active adapter out of the model; its layers keep their hold on the base's."""
    root, injection = injected_module(model), injection_of(model)
    if root is None or injection is None:
        raise UserError("the model has no AdaLoRA layers.")
    layers = [layer for _, layer in adapter_layers(root)]
    replace_modules(root, {layer: layer.base_layer for layer in layers})
    for attribute in ("adalora", "save_pretrained"):
        vars(root).pop(attribute, None)
    return _Aside(layers, injection)


def _put_in(root: nn.Module, aside: _Aside) -> None:
    for layer in aside.layers:
        layer.to(layer.weight.device)  # the model may have moved meanwhile
        layer.train(layer.base_layer.training)
    replace_modules(root, {layer.base_layer: layer for layer in aside.layers})
    attach_injection(root, aside.injection)
    save_adapter_alone(root)


def refuse_trained_modules(names: list[str]) -> NoReturn:
    """Refuse a second adapter where one of the two has modules that were trained in full: the model holds one of each.

    Raises:
        Unsupported: always.
    """
    raise Unsupported(
        f"load_adapter: '{names[0]}' was trained in full (modules_to_save), and a model with two adapters holds it "
        f"once; load that adapter onto a base of its own."
    )


def _unknown(model: nn.Module, call: str, name: str) -> UserError:
    return UserError(
        f"{call}: there is no adapter '{name}'; the model has {', '.join(adapter_names(model)) or 'none'}."
    )
