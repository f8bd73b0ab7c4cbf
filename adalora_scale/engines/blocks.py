"""Where a model's transformer blocks are."""

from __future__ import annotations

import ast
import functools

import torch
from torch import nn

from adalora_scale.quantization.class_source import defined_beside, tree_of


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks: what stands in the outermost ModuleLists, or in lists in these (Funnel's)."""
    found: list[nn.Module] = []
    for module in model.children():
        if isinstance(module, nn.ModuleList):
            for block in module:
                if isinstance(block, nn.ModuleList):
                    found += transformer_blocks(nn.ModuleList([block]))
                elif any(True for _ in block.parameters()):
                    found.append(block)
        else:
            found += transformer_blocks(module)
    return found


def called_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the transformer blocks that are called, so that hooks on them run.

    SqueezeBERT's encoder calls its blocks' `forward`: there none is returned.
    """
    past_hooks = any(_calls_forward(type(module)) for module in model.modules())  # type: ignore[arg-type]
    return [] if past_hooks else transformer_blocks(model)


def blocks_in_function(model: nn.Module) -> str | None:
    """Return the name of an autograd function that runs a model's blocks (Reformer's), inside which hooks on gradients
    do not act; None where there is none."""
    for name, item in defined_beside(model).items():
        if isinstance(item, type) and issubclass(item, torch.autograd.Function) and _loops_over_layers(item):
            return name
    return None


def _loops_over_layers(function: type[torch.autograd.Function]) -> bool:
    """Whether its forward calls each of what one of its arguments holds."""
    tree = tree_of(function.forward)
    for loop in ast.walk(tree) if tree is not None else ():
        if isinstance(loop, ast.For) and isinstance(loop.target, ast.Name):
            calls = (node.func for node in ast.walk(loop) if isinstance(node, ast.Call))
            if any(isinstance(called, ast.Name) and called.id == loop.target.id for called in calls):
                return True
    return False


@functools.cache
def _calls_forward(kind: type[nn.Module]) -> bool:
    """Whether a class's forward loops over modules and calls the `forward` of each."""
    tree = tree_of(kind.forward)
    for loop in ast.walk(tree) if tree is not None else ():
        if isinstance(loop, ast.For):
            items = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
            for node in ast.walk(loop):
                called = node.func if isinstance(node, ast.Call) else None
                value = called.value if isinstance(called, ast.Attribute) and called.attr == "forward" else None
                if isinstance(value, ast.Name) and value.id in items:
                    return True
    return False
