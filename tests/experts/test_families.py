"""Every family of transformers with experts: its class computes the same once split, or is named here with the reason.

The class alone is built, from what its `__init__` reads of a config: no model, and no list of families to keep.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.experts.modules import Repeated, is_experts, projections, split_experts

NOT_SPLIT = {
    "DbrxExperts": "its tensors are 2-D, all experts below one another, cut by views in the forward",
    "InklingSharedExperts": "experts that all see every token, weighted before the last projection, on three tensors",
    "JetMoeParallelExperts": "one projection a module, called with counts instead of an order",
    "LongcatFlashExperts": "experts that do nothing are counted among them, with weights in one projection only",
    "NllbMoeExperts": "a dictionary of dense layers, which are adapted as such",
    "SwitchTransformersExperts": "a dictionary of dense layers, which are adapted as such",
}
"""Class → why it stays as it is; all-linear refuses what has 3-D tensors by name."""
_MODELS = Path(transformers.__file__).parent / "models"
_EXPERTS, _SMALL, _LARGE = 5, 16, 24
_VALUES = {
    "limit": 7.0, "alpha": 1.7, "eps": 1e-6, "softcap": 30.0, "latent": None, "intermediate|ffn": _LARGE,
    "hidden|dim|d_model": _SMALL,
}  # fmt: skip


def classes() -> list[tuple[str, str]]:
    """(module, class) of everything that is called experts or uses the interface for them."""
    found = []
    for path in sorted(_MODELS.glob("*/modeling_*.py")):
        for decorator, name in re.findall(r"^(@use_experts_implementation.*\n)?class (\w+)\(", path.read_text(), re.M):
            if decorator or name.endswith("Experts"):
                found.append((f"transformers.models.{path.parent.name}.{path.stem}", name))
    return found


FOUND = classes()


class Config:
    """Says what a config would, by the words in a key."""

    _experts_implementation = "eager"

    def __getattr__(self, key: str) -> Any:
        if "act" in key:
            return "silu"
        if "expert" in key and re.search(r"(^|_)(num|n)(_|$)", key):
            return _EXPERTS
        for word, value in _VALUES.items():
            if re.search(word, key):
                return value
        raise AssertionError(f"what is '{key}' of a config?")


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = kind(Config()).double()
    for parameter in module.parameters():
        nn.init.normal_(parameter, 0, 0.3)
    return module


@pytest.mark.parametrize(("module", "name"), FOUND, ids=[name for _, name in FOUND])
def test_every_kind_of_experts_computes_the_same_once_split_or_is_named(module: str, name: str) -> None:
    """A new family fails here until it is one or the other."""
    kind = getattr(importlib.import_module(module), name)
    if name in NOT_SPLIT:
        assert "use_experts_implementation" not in inspect.getsource(kind)
        return
    experts = built(kind)
    assert is_experts(experts), f"{name} is of a kind that nothing splits"
    generator = torch.Generator().manual_seed(1)
    weights = {id(parameter) for parameter in experts.parameters()}
    x = torch.randn(_EXPERTS * 3, _SMALL, dtype=torch.float64, generator=generator)
    routing: tuple[torch.Tensor, ...] = ()
    split = built(kind)
    split_experts(split)
    if not isinstance(split, Repeated):
        index = torch.rand(len(x), _EXPERTS - 1, generator=generator).topk(2).indices  # the last expert gets no token
        routing = (index, torch.rand(index.shape, dtype=torch.float64, generator=generator))
    sources = "".join(
        inspect.getsource(type(inner)) for inner in experts.modules() if "models" in type(inner).__module__
    )
    tolerance = 1e-5 if re.search(r"float32|\.float\(\)", sources) else 1e-12
    expected, actual = experts(x, *routing), split(x, *routing)
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
    assert all(isinstance(getattr(split, leaf), ExpertLinear) for leaf in projections(split))
    assert len(list(split.parameters())) == len(weights)
    slope = torch.randn(actual.shape, dtype=torch.float64, generator=generator)
    (expected * slope).sum().backward()
    (actual * slope).sum().backward()
    theirs = dict(experts.named_parameters())
    for own, parameter in split.named_parameters():
        other = theirs[re.sub(r"_proj\.(weight|bias)$", lambda m: "_proj" + "_bias" * (m[1] == "bias"), own)]
        torch.testing.assert_close(parameter.grad, other.grad, rtol=10 * tolerance, atol=10 * tolerance)


def test_nothing_is_named_that_is_not_there() -> None:
    """A reason whose class is gone says nothing any more."""
    assert NOT_SPLIT.keys() <= {name for _, name in FOUND}
    assert len(FOUND) > 60
