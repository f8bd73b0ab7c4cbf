"""YAML without its traps: no tags that make objects, no aliases that multiply, no key twice, no depth without end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from adalora_scale.errors import UserError
from adalora_scale.messages import quoted
from adalora_scale.reading.text import MAX_DEPTH, read_text, whole_number

MAX_YAML_BYTES = 2**18
"""Of a file: PyYAML's parser takes some seconds for it."""
MAX_VALUES = 100_000
"""Keys and values, those behind aliases counted wherever an alias repeats them."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with whole numbers of a length that can be computed and printed."""

    def whole_number(self, node: yaml.ScalarNode) -> int:
        """Return a scalar's value where it has at most 64 bits."""
        value: int = self.construct_yaml_int(node)
        try:
            return whole_number(value)
        except ValueError as error:
            raise yaml.MarkedYAMLError(problem=str(error), problem_mark=node.start_mark) from None


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.whole_number)


def read_yaml(path: str | Path, what: str) -> Any:
    """Return what a YAML file holds.

    Args:
        path: the file, at most `MAX_YAML_BYTES` long.
        what: its name in messages, for example "the config".

    Raises:
        UserError: it cannot be read (`read_text`), or is not YAML as `parse_yaml` takes it.
    """
    text = read_text(path, what, limit=MAX_YAML_BYTES)
    try:
        return parse_yaml(text)
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{path}{line} is not valid YAML: {error.problem}.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {error}.") from None


def parse_yaml(text: str) -> Any:
    """Return what a YAML text holds, of plain types alone.

    Raises:
        yaml.YAMLError: it is not YAML, states a key twice, nests deeper than `MAX_DEPTH`, holds more than `MAX_VALUES`
            with aliases written out, or a value that its tag does not fit.
    """
    loader: Any = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return loader.construct_document(node)
    except RecursionError:
        raise yaml.YAMLError("it nests too deeply") from None
    except (ValueError, LookupError, AttributeError, ArithmeticError, TypeError) as error:
        # What PyYAML's own constructors raise: of a 13th month, 5,000 digits, `!!bool maybe`.
        raise yaml.YAMLError(f"a value does not fit its type ({type(error).__name__}: {error})") from None
    finally:
        if loader is not None:
            loader.dispose()


def _count(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return how many values a node stands for, with its aliases written out."""
    if depth > MAX_DEPTH:
        raise yaml.MarkedYAMLError(problem=f"it nests deeper than {MAX_DEPTH} levels", problem_mark=node.start_mark)
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.MarkedYAMLError(problem="an alias stands for what it is in", problem_mark=node.start_mark)
        return known[id(node)]
    known[id(node)] = 0
    inner: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _refuse_repeated(node)
        inner = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        inner = node.value
    total = 1 + sum(_count(part, known, depth + 1) for part in inner)
    if total > MAX_VALUES:
        raise yaml.MarkedYAMLError(
            problem=f"it holds more than {MAX_VALUES:,} values, counting what aliases repeat",
            problem_mark=node.start_mark,
        )
    known[id(node)] = total
    return total


def _refuse_repeated(node: yaml.MappingNode) -> None:
    seen: dict[tuple[str, str], yaml.Mark] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue
        if (first := seen.get((key.tag, key.value))) is not None:
            raise yaml.MarkedYAMLError(
                problem=f"the key {quoted(key.value)} stands there twice, in lines {first.line + 1} and "
                f"{key.start_mark.line + 1}",
                problem_mark=key.start_mark,
            )
        seen[key.tag, key.value] = key.start_mark
