"""transformers' experts modules with their projections as layers of their own, which can be wrapped and quantised.

An experts module has one 3-D parameter a projection, which its forward multiplies by itself: nothing can be put in
between. `split_experts` makes each such parameter an `ExpertLinear` of the same name and gives the module a forward
that calls them; gate, activation and everything around stay the module's own.

Source: transformers/integrations/moe.py, use_experts_implementation and grouped_mm_experts_forward.
"""

from __future__ import annotations

import functools
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from adalora_scale.errors import Unsupported
from adalora_scale.experts.groups import by_expert, equal_parts
from adalora_scale.experts.linear import ExpertLinear

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
"""Names of an experts module's 3-D parameters; one has `gate_up_proj` or, without a gate, `up_proj`."""
_COMPUTED_IN = {torch.float64, torch.float32, torch.bfloat16, torch.float16}
LOOP, KERNEL = "eager", "grouped_mm"
"""The values of transformers' `experts_implementation` that a split module follows."""


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
        Unsupported: it computes in a way that a split module does not (`why_not_split`).
    """
    if isinstance(module, Routed | Repeated):
        return
    mixin = _mixin(module)
    if mixin is None:
        raise ValueError(f"{type(module).__name__} is no experts module of a known kind.")
    if (reason := why_not_split(module)) is not None:
        raise Unsupported(f"cannot adapt the experts in {type(module).__name__}: {reason}.")
    transposed = lies_input_first(module)
    for leaf in projections(module):
        weight = cast(nn.Parameter, getattr(module, leaf))
        bias = getattr(module, f"{leaf}_bias", None)
        delattr(module, leaf)
        if bias is not None:
            delattr(module, f"{leaf}_bias")
        setattr(module, leaf, ExpertLinear(weight, bias, transposed=transposed))
    module.__class__ = _split_kind(mixin, type(module))  # type: ignore[arg-type]  # classes can be hashed


def split_all_experts(model: nn.Module) -> None:
    """Split every experts module of a known kind in a model, in place.

    One with a reason against it (`why_not_split`) stays as it is, with 3-D parameters that nothing adapts.
    """
    for module in list(model.modules()):
        if is_experts(module) and why_not_split(module) is None:
            split_experts(module)


def join_all_experts(model: nn.Module) -> None:
    """Undo `split_all_experts`, in place: transformers' classes, with the same parameters under their own names."""
    for module in list(model.modules()):
        if not isinstance(module, Routed | Repeated):
            continue
        for leaf in projections(module):
            layer = cast(ExpertLinear, getattr(module, leaf))
            delattr(module, leaf)
            setattr(module, leaf, layer.weight)
            if layer.bias is not None:
                setattr(module, f"{leaf}_bias", layer.bias)
        module.__class__ = module.original  # type: ignore[assignment]


def why_not_split(module: nn.Module) -> str | None:
    """Say why an experts module cannot be split, and what would help; None where it can, or is no experts module."""
    if isinstance(module, Routed | Repeated) or _mixin(module) is None:
        return None
    asked = _implementation(module)
    if asked not in (None, LOOP, KERNEL):
        return (
            f"experts_implementation={asked} multiplies by their weights itself; load the model with {KERNEL} or {LOOP}"
        )
    if getattr(module, "_is_expert_parallel", False):
        return "they are spread over ranks by expert parallelism; load the model without ep_size and an expert plan"
    if any(_shape(getattr(module, leaf))[0] == 1 for leaf in projections(module)):
        return "it has one expert alone"
    stored = {getattr(module, leaf).dtype for leaf in projections(module)} - _COMPUTED_IN
    if stored:
        kinds = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in stored))
        return f"their weights are quantised by the checkpoint ({kinds}); load one that has them in 16 bits"
    if any(hasattr(parameter, "placements") for parameter in module.parameters()):
        return "their weights are sharded already; put adapters on before sharding"
    if "forward" in vars(module):
        return "a hook has replaced their forward (a device map, expert parallelism); load the model without it"
    return None


@functools.cache
def _split_kind(mixin: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    return type(f"Split{kind.__name__}", (mixin, kind), {"__module__": kind.__module__, "original": kind})


def _unpickled(kind: type[nn.Module]) -> nn.Module:
    """Return an instance without attributes, which pickle sets: no module has the class by its name."""
    split = _split_kind(Repeated if _BY_NAME.get(kind.__name__) is Repeated else Routed, kind)  # type: ignore[arg-type]
    return split.__new__(split)


def lies_input_first(module: nn.Module) -> bool:
    """Return whether an experts module's tensors are (experts, in, out); Llama 4's are, and it does not say so."""
    return bool(getattr(module, "is_transposed", isinstance(module, Repeated) or _mixin(module) is Repeated))


def _implementation(module: nn.Module) -> str | None:
    return getattr(getattr(module, "config", None), "_experts_implementation", None)


class _Split(nn.Module):
    """What both kinds of split modules share."""

    original: ClassVar[type[nn.Module]]
    """transformers' class."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _unpickled, (self.original,), self.__dict__

    def _loops(self) -> bool:
        """Return whether experts are to be computed one by one.

        Raises:
            Unsupported: the model was switched to an implementation that a split module has no part in.
        """
        asked = _implementation(self)
        if asked not in (None, LOOP, KERNEL):
            raise Unsupported(
                f"experts_implementation={asked} would leave adapters on experts out; set it to {KERNEL} or {LOOP}."
            )
        return asked == LOOP


class Routed(_Split):
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
        groups, order = by_expert(top_k_index, me.num_experts, loop=self._loops())
        x = hidden_states.index_select(0, order // k)
        x = (
            me._apply_gate(me.gate_up_proj(x, groups))
            if getattr(me, "has_gate", True)
            else me.act_fn(me.up_proj(x, groups))
        )
        y = me.down_proj(x, groups)
        if getattr(me, "has_post_expert_norm", False):
            y = me.post_expert_norm(y)
        y = y * top_k_weights.reshape(-1).index_select(0, order).unsqueeze(-1)
        y = torch.empty_like(y).index_copy(0, order, y)  # back to the order of tokens: a sum that repeats bit for bit
        return y.view(*top_k_index.shape, y.shape[-1]).sum(1).to(hidden_states.dtype)


class Repeated(_Split):
    """Forward of experts that are all given every token, one expert's rows after another's (Llama 4)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return (experts · tokens, features) for an input of that shape."""
        me = cast(Any, self)
        groups = equal_parts(hidden_states.shape[0], me.num_experts, hidden_states.device)
        gate, up = me.gate_up_proj(hidden_states, groups).chunk(2, dim=-1)
        return cast(Tensor, me.down_proj(up * me.act_fn(gate), groups))


_BY_NAME: dict[str, type[Routed | Repeated]] = {"Llama4TextExperts": Repeated, "Step3p7Experts": Routed}
"""Classes without the interface's attributes; Llama 4 multiplies by x @ W, Step 3.7 has the interface's forward."""


def _mixin(module: nn.Module) -> type[Routed | Repeated] | None:
    parameters = dict(module.named_parameters(recurse=False))
    if not all(len(_shape(parameters[leaf])) == 3 for leaf in PROJECTIONS if leaf in parameters):
        return None
    if "down_proj" not in parameters or not {"gate_up_proj", "up_proj"} & parameters.keys():
        return None
    if hasattr(module, "has_gate") and hasattr(module, "is_transposed"):
        return Routed
    return _BY_NAME.get(type(module).__name__)


def _shape(parameter: nn.Parameter) -> torch.Size:
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))
