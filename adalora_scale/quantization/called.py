"""Which layers a model calls, and of which it reads the weight itself.

An adapter, or a layer in 4 bits, stands in the place of a layer and acts when that is called. Some models call a layer
never, or not always: Mamba's mixer multiplies by `dt_proj.weight`, torch's MultiheadAttention hands `out_proj.weight`
to a function. What a module does is read off its own source: the methods that its forward reaches. And some layers are
linear by their class alone, as routers that return something else.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adalora_scale.quantization.class_source import tree_of

_ABOUT = {"dtype", "device", "shape", "size", "dim", "ndim", "numel", "requires_grad", "is_meta", "element_size"}
"""What may be asked of a weight without multiplying by it."""
_LEAVES_ITS_PATH = (nn.TransformerEncoderLayer, nn.TransformerEncoder)
"""Their fused path is switched off where something in them is adapted (`injection.replace_modules`)."""


@dataclass(frozen=True)
class Read:
    """A layer whose weight the module around it reads."""

    by: str
    """Class of that module."""
    also_called: bool
    """Whether it calls the layer too, on another path."""

    def __str__(self) -> str:
        return f"{self.by} multiplies by its weight itself{' on one of its paths' * self.also_called}"


def weights_read(model: nn.Module) -> dict[str, Read]:
    """Return name → who reads the layer's weight, for every layer of which a module around it does."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, Read] = {}
    for module in model.modules():
        if isinstance(module, _LEAVES_ITS_PATH):
            continue
        paths = _paths(type(module))  # type: ignore[arg-type]  # classes can be hashed
        for path, called in paths.items():
            for layer in _resolved(module, path.split(".")):
                name = names.get(id(layer), "")
                earlier = found.get(name)
                if name and (earlier is None or earlier.also_called):  # one that never calls it decides
                    found[name] = Read(type(module).__name__, called)
    return found


@torch.no_grad()
def computes_linear(module: nn.Module) -> bool:
    """Return whether a linear layer's forward gives its input times its weight, whichever class wrote it.

    Falcon's layers have a forward of their own that does; Llama 4's routers have one that returns scores and weights.
    It is tried out, with other numbers in a stand-in of the layer.
    """
    plain = next((kind for kind in (nn.Linear, Conv1D) if isinstance(module, kind)), None)
    if plain is None or type(module).forward is plain.forward:
        return plain is not None
    shape = (3, 2) if plain is Conv1D else (2, 3)
    weight, x = torch.arange(1.0, 7.0).view(shape), torch.arange(6.0).view(2, 3)
    bias = torch.ones(2) if module.bias is not None else None
    stand_in = copy.copy(module)
    sides = {"nx": 3, "nf": 2} if plain is Conv1D else {"in_features": 3, "out_features": 2}
    parameters = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    stand_in.__dict__ = {**vars(module), "_parameters": parameters, **sides}
    try:
        given = type(module).forward(stand_in, x)
    except Exception:  # whatever it needs, it is no linear layer
        return False
    wanted = x @ (weight if plain is Conv1D else weight.T) + (0 if bias is None else bias)
    return isinstance(given, Tensor) and given.shape == wanted.shape and torch.allclose(given, wanted)


def _resolved(module: nn.Module, path: list[str]) -> Iterator[nn.Module]:
    """Yield the modules at a path below `module`; `*` is every child."""
    if not path:
        yield module
        return
    first, *rest = path
    children = module.children() if first == "*" else [module._modules.get(first)]
    for child in children:
        if child is not None:
            yield from _resolved(child, rest)


@functools.cache
def _paths(kind: type) -> dict[str, bool]:
    """Return path → whether it is called too, of every layer whose weight a class's forward reads."""
    read: set[str] = set()
    whole: set[str] = set()  # a part of it is another path's, chosen by an option (BLOOM's slow_but_exact)
    called: set[str] = set()
    todo, seen = [("forward", 0)], set()
    while todo:
        name, skipped = todo.pop()
        owners = [owner for owner in kind.__mro__ if name in vars(owner) and owner is not nn.Module]
        if (name, skipped) in seen or len(owners) <= skipped:
            continue
        seen.add((name, skipped))
        tree = tree_of(vars(owners[skipped])[name])
        if tree is None:
            continue
        aliases = _aliases(tree)
        parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        for node in ast.walk(tree):
            if not isinstance(node, ast.Attribute):
                continue
            if isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super":
                todo.append((node.attr, skipped + 1))
            path = _path(node, aliases)
            if path is None:
                continue
            if len(path) == 1:
                todo.append((path[0], 0))
            if path[-1] == "weight" and len(path) > 1 and not _only_asks(node, parents):
                read.add(".".join(path[:-1]))
                whole |= {".".join(path[:-1])} if _is_operand(node, parents) else set()
        called |= {
            ".".join(path)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and (path := _path(node.func, aliases)) is not None
        }
    return {path: path in called for path in read if path not in called or path in whole}


def _aliases(tree: ast.AST) -> dict[str, list[str]]:
    """Return local names that stand for something of `self`: ``layer = self.dt_proj``, ``for block in self.blocks``."""
    found: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            path = _path(node.value, {})
            if path:
                found[node.targets[0].id] = path
        elif isinstance(node, ast.For):
            items, item = node.iter, node.target
            if isinstance(items, ast.Call) and getattr(items.func, "id", "") == "enumerate" and items.args:
                items = items.args[0]
                item = item.elts[-1] if isinstance(item, ast.Tuple) else item
            path = _path(items, {})
            if path and isinstance(item, ast.Name):
                found[item.id] = [*path, "*"]
    return found


def _path(node: ast.AST, aliases: dict[str, list[str]]) -> list[str] | None:
    """Return ["a", "*", "b"] for ``self.a[i].b``; None for what does not begin with self."""
    if isinstance(node, ast.Name):
        return [] if node.id == "self" else aliases.get(node.id)
    if isinstance(node, ast.Attribute | ast.Subscript):
        before = _path(node.value, aliases)
        if before is None:
            return None
        return [*before, node.attr if isinstance(node, ast.Attribute) else "*"]
    return None


def _only_asks(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a weight is only asked for its dtype, or whether it is there."""
    around = parents.get(node)
    if isinstance(around, ast.Attribute):
        return around.attr in _ABOUT
    if isinstance(around, ast.Call):
        return getattr(around.func, "id", "") in ("isinstance", "hasattr", "id")
    return isinstance(around, ast.Compare) and all(isinstance(op, ast.Is | ast.IsNot) for op in around.ops)


def _is_operand(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> bool:
    """Whether a weight is multiplied, or handed over, as it is."""
    around = parents.get(node)
    return isinstance(around, ast.Call | ast.keyword | ast.BinOp)
