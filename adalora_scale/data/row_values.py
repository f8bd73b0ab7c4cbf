"""What a reader of rows gives and how it reads single values; what it refuses, `BadColumn` names.

Nothing here knows a layout's columns in the file (`layouts.py`), only those that tokenising takes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from adalora_scale.data.row_limits import MAX_ROW_BYTES
from adalora_scale.data.turns import Turn, Unfit, conversation
from adalora_scale.messages import quoted

Layout = Literal["messages", "prompt_completion", "prompt_completion_turns", "text", "classification"]
"""What tokenising takes."""
Row = Mapping[str, Any]

COLUMNS: dict[Layout, dict[str, str]] = {
    "messages": dict.fromkeys(("messages", "tools", "documents", "chat_template_kwargs"), "json"),
    "prompt_completion": dict.fromkeys(("prompt", "completion"), "string"),
    "prompt_completion_turns": {
        **dict.fromkeys(("messages", "tools", "documents", "chat_template_kwargs"), "json"),
        "prompt_turns": "int64",
    },
    "classification": {**dict.fromkeys(("text", "text_pair"), "string"), "label": "json"},
    "text": {"text": "string"},
}
"""Columns of each layout and their types: text, whole numbers, and JSON of any shape."""

CONVERSATIONS: tuple[Layout, ...] = ("messages", "prompt_completion_turns")
"""Layouts that a chat template renders."""


class BadColumn(Exception):
    """A row's value that cannot be used: the column, and what is wrong."""

    def __init__(self, column: str, problem: str) -> None:
        super().__init__(f"column '{column}' {problem}")


@dataclass(frozen=True)
class Reader:
    """How rows of one file become rows of a layout."""

    layout: Layout
    read: Callable[[Row, set[str]], dict[str, Any]]
    """Gives a row's columns and adds what was left unused, in words; raises `BadColumn`."""
    used: frozenset[str]
    """The columns that it looks at."""
    notes: tuple[str, ...] = field(default=())
    """What is said of every row, in words."""


def label_in(row: Row, column: str) -> str:
    """Return the JSON of a row's label: text, a number, or a list of them; `labels.py` says what they mean."""
    value = required(row, column)
    for part in value if isinstance(value, list) else [value]:
        if part == "" or not isinstance(part, str | int | float) or part != part:
            raise BadColumn(column, f"must be a class name, a number or a list of them, not {quoted(value)}")
        if isinstance(part, float) and math.isinf(part):
            raise BadColumn(column, f"must be finite, not {part}")
    return as_json(column, value)


def first_there(row: Row, names: tuple[str, ...]) -> str | None:
    """Return the first of some columns that has a value in this row."""
    return next((name for name in names if row.get(name) is not None), None)


def turns_in(row: Row, column: str, notes: set[str]) -> list[Turn]:
    """Return a row's conversation; `notes` gets what was left unused."""
    return parsed(column, required(row, column), lambda value: conversation(value, notes))


def required(row: Row, column: str) -> Any:
    """Return a value that must be there."""
    if row.get(column) is None:
        raise BadColumn(column, "is missing")
    return row[column]


def text_in(row: Row, column: str) -> str:
    """Return a value that must be text."""
    value = required(row, column)
    if not isinstance(value, str):
        raise BadColumn(column, f"must be text, not {type(value).__name__}")
    return _short_enough(column, value)


def as_json(column: str, value: Any) -> str:
    """Return a value's JSON text."""
    return _short_enough(column, json.dumps(value, ensure_ascii=False, default=lambda other: _as_text(column, other)))


def _as_text(column: str, value: Any) -> str:
    """Return what has no form in JSON: dates and decimals of a table as text."""
    if isinstance(value, bytes | bytearray | memoryview):
        raise BadColumn(column, "holds bytes; only text can be trained on")
    return str(value)


def _short_enough(column: str, text: str) -> str:
    size = len(text) if text.isascii() else len(text.encode(errors="replace"))
    if size > MAX_ROW_BYTES:
        raise BadColumn(
            column, f"is {size:,} bytes long; split the row into several of at most {MAX_ROW_BYTES:,} bytes"
        )
    return text


def parsed(column: str, value: Any, parse: Callable[[Any], Any]) -> Any:
    """Return what `parse` makes of a value; what it refuses gets the column's name."""
    try:
        return parse(value)
    except Unfit as problem:
        raise BadColumn(column, str(problem)) from None
