"""transformers' experts modules with their projections as layers of their own, which can be wrapped and quantised.

An experts module has one 3-D parameter a projection, which its forward multiplies by itself: nothing can be put in
between. `split_experts` makes each such parameter an `ExpertLinear` of the same name and gives the module a forward
that calls them; gate, activation and everything around stay the module's own.

Source: transformers/integrations/moe.py, use_experts_implementation and grouped_mm_experts_forward.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from adalora_scale.experts.groups import by_expert, equal_parts
from adalora_scale.experts.linear import ExpertLinear

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of an experts module's 3-D parameters; one has `gate_up_proj` or, without a gate, `up_proj`."""


def is_experts(module: nn.Module) -> bool:
    """Return whether a module is of a kind that `split_experts` knows, split or not."""
    return isinstance(module, Routed | Repeated) or _mixin(module) is not None


def projections(module: nn.Module) -> list[str]:
    """Return the names of an experts module's projections, in the order in which they are called."""
    return [leaf for leaf in PROJECTIONS if getattr(module, leaf, None) is not None]


def split_experts(module: nn.Module) -> None:
    """Make a module's projections layers, in place; parameters stay the same objects, under `<projection>.weight`.

    Raises:
        ValueError: it is no experts module.
    """
    if isinstance(module, Routed | Repeated):
        return
    mixin = _mixin(module)
    if mixin is None:
        raise ValueError(f"{type(module).__name__} is no experts module of a known kind.")
    for leaf in projections(module):
        weight = cast(nn.Parameter, getattr(module, leaf))
        bias = getattr(module, f"{leaf}_bias", None)
        delattr(module, leaf)
        if bias is not None:
            delattr(module, f"{leaf}_bias")
        setattr(module, leaf, ExpertLinear(weight, bias, transposed=_is_transposed(module)))
    kind = type(module)
    module.__class__ = type(f"Split{kind.__name__}", (mixin, kind), {"__module__": kind.__module__})


def split_all_experts(model: nn.Module) -> None:
    """Split every experts module of a known kind in a model, in place."""
    for module in list(model.modules()):
        if is_experts(module):
            split_experts(module)


class Routed(nn.Module):
    """Forward of experts that are given each token's experts and their weights."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return (tokens, features): the weighted sum of each token's experts.

        Args:
            hidden_states: (tokens, features).
            top_k_index: (tokens, k) int64.
            top_k_weights: (tokens, k).
        """
        me = cast(Any, self)
        k = top_k_index.shape[-1]
        groups, order = by_expert(top_k_index, me.num_experts)
        x = hidden_states.index_select(0, order // k)
        x = me._apply_gate(me.gate_up_proj(x, groups)) if me.has_gate else me.act_fn(me.up_proj(x, groups))
        y = me.down_proj(x, groups)
        if getattr(me, "has_post_expert_norm", False):
            y = me.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1).index_select(0, order).unsqueeze(-1)
        y = torch.empty_like(y).index_copy(0, order, y)  # back to the order of tokens: a sum that repeats bit for bit
        return y.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)


class Repeated(nn.Module):
    """Forward of experts that are all given every token, one expert's rows after another's (Llama 4)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (experts · tokens, features) for an input of that shape."""
        me = cast(Any, self)
        groups = equal_parts(hidden_states.shape[0], me.num_experts, hidden_states.device)
        gate, up = me.gate_up_proj(hidden_states, groups).chunk(2, dim=-1)
        return cast(Tensor, me.down_proj(up * me.act_fn(gate), groups))


def _mixin(module: nn.Module) -> type[Routed | Repeated] | None:
    parameters = dict(module.named_parameters(recurse=False))
    if not all(len(_shape(parameters[leaf])) == 3 for leaf in PROJECTIONS if leaf in parameters):
        return None
    if "down_proj" not in parameters or not {"gate_up_proj", "up_proj"} & parameters.keys():
        return None
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
        return Routed
    return Repeated if type(module).__name__ == "Llama4TextExperts" else None


def _is_transposed(module: nn.Module) -> bool:
    return bool(getattr(module, "is_transposed", True))  # Llama 4, the kind without the attribute, multiplies x @ W


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
