"""What a value of each column must be: once for a whole column, and once for a single row to say what is wrong.

`messages` is a non-empty list of turns with text in `role` and `content`; `prompt`, `completion` and `text` are text;
`label` is a class name or a whole number. Null is nowhere allowed.
"""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc


def column_is_valid(dataset: datasets.Dataset, name: str, column: str) -> bool:
    """Check a whole column in Arrow; `value_problem` states the same rules for one row, to find the line."""
    values: pa.ChunkedArray = dataset.with_format("arrow")[:][name]
    feature = dataset.features[name]
    try:
        values.validate(full=True)  # the JSON builder lets text through that is not UTF-8
    except pa.ArrowInvalid:
        return False
    if values.null_count:
        return False
    if column == "label":
        if pa.types.is_floating(values.type):
            return bool(pc.all(pc.equal(pc.floor(values), values)).as_py())
        if _is_text(feature):
            return not pc.any(pc.equal(values, "")).as_py()
        return pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)
    if column != "messages":
        return _is_text(feature)
    turn = getattr(feature, "feature", None)
    if not isinstance(turn, dict) or not all(_is_text(turn.get(key)) for key in ("role", "content")):
        return False
    if not pc.all(pc.greater(pc.list_value_length(values), 0)).as_py():
        return False
    turns = pc.list_flatten(values)
    return not turns.null_count and not any(pc.struct_field(turns, key).null_count for key in ("role", "content"))


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def value_problem(value: Any, column: str) -> str | None:
    """Say what is wrong with one value, or None."""
    if column == "label":
        if value == "" or not isinstance(value, str | int | float) or value != value:
            return f"must be a class name or a whole number, not {value!r}"
        return None if not isinstance(value, float) or value.is_integer() else f"must be whole, not {value}"
    if column != "messages":
        return None if isinstance(value, str) else f"must be text, not {type(value).__name__}"
    if not isinstance(value, list) or not value:
        return f"must be a non-empty list of {{role, content}}, not {_short(value)}"
    for index, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            return f"turn {index} must be {{role, content}} with text in both, not {_short(turn)}"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
