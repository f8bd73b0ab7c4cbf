"""Where a model's transformer blocks are."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap

from torch import nn


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


@functools.cache
def _calls_forward(kind: type[nn.Module]) -> bool:
    """Whether a class's forward loops over modules and calls the `forward` of each."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(kind.forward))))
    except (OSError, TypeError, SyntaxError):  # made at run time: its source is nowhere
        return False
    for loop in ast.walk(tree):
        if isinstance(loop, ast.For):
            items = {node.id for node in ast.walk(loop.target) if isinstance(node, ast.Name)}
            for node in ast.walk(loop):
                called = node.func if isinstance(node, ast.Call) else None
                value = called.value if isinstance(called, ast.Attribute) and called.attr == "forward" else None
                if isinstance(value, ast.Name) and value.id in items:
                    return True
    return False
