"""Which modules of a mixture of experts choose the experts of a token."""

from __future__ import annotations

import re

from torch import nn

from adalora_scale.experts.modules import is_experts

_ROUTER = re.compile(r"router|topkgat", re.IGNORECASE)
_GATES = ("gate", "gating")
"""Names of routers beside experts; elsewhere, and under longer names, a gate is a layer like others."""
_EXPERTS = "experts"


def routers(model: nn.Module) -> set[str]:
    """Return the names of a model's routers, whatever they are made of; parts of one are not named.

    A router is what is called one, by its class or by its own name, and a `gate` that stands beside experts. The gate
    of a shared expert chooses none and is no router.
    """
    found: set[str] = set()
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf and (_ROUTER.search(type(module).__name__) or _ROUTER.search(leaf)):
            found.add(name)
        if any(is_experts(child) or own == _EXPERTS for own, child in module.named_children()):
            found |= {f"{name}.{gate}".lstrip(".") for gate in _GATES if getattr(module, gate, None) is not None}
    return {name for name in found if not any(name.startswith(other + ".") for other in found)}
