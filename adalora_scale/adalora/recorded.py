"""Which layers' outputs transformers records by their class: router logits for an auxiliary loss, above all.

A hook sits on every module of a recorded class. In an adapted layer that is the base layer, and what is recorded would
be without the adapter.

Source: transformers/utils/output_capturing.py, recursively_install_hooks.
"""

from __future__ import annotations

from torch import nn


def recorded(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Return name → what it is recorded as (`router_logits`), of those of a model's modules that are.

    Args:
        model: before its modules are replaced.
        names: of modules in it.
    """
    found: dict[str, str] = {}
    for above, part in model.named_modules():
        asked = getattr(part, "_can_record_outputs", None)
        for key, specs in (asked if isinstance(asked, dict) else {}).items():
            for spec in specs if isinstance(specs, list) else [specs]:
                found |= {name: key for name in names if _is_below(name, above) and _matches(spec, model, name)}
    return found


def _is_below(name: str, above: str) -> bool:
    return not above or name.startswith(above + ".")


def _matches(spec: object, model: nn.Module, name: str) -> bool:
    kind = getattr(spec, "target_class", spec)
    ending = spec if isinstance(spec, str) else getattr(spec, "class_name", None)
    if not (isinstance(kind, type) and isinstance(model.get_submodule(name), kind)) and not (
        ending is not None and name.endswith(ending)
    ):
        return False
    layer = getattr(spec, "layer_name", None)
    return layer is None or f".{layer.strip('.')}." in f".{name}."
