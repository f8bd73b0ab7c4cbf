"""What stands in the source of a model's classes."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from typing import Any


def tree_of(function: object) -> ast.AST | None:
    """Return the syntax tree of a function's source; None where it has none, as what is made at run time."""
    function = inspect.unwrap(getattr(function, "__func__", function))  # type: ignore[arg-type]
    if not inspect.isfunction(function):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # made at run time: its source is nowhere
        return None


def defined_beside(model: Any) -> dict[str, Any]:
    """Return what the module of a model's class defines; FSDP2 puts a class of torch's in front of it."""
    own = next(kind for kind in type(model).__mro__ if not kind.__module__.startswith("torch."))
    return vars(sys.modules[own.__module__])
