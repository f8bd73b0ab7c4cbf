"""What a value of each column must be: once for a whole column, and once for a single row to say what is wrong.

`messages` is a non-empty list of turns with text in `role` and `content`; `prompt`, `completion` and `text` are text;
`label` is a class name or a whole number. Null is nowhere allowed.
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adalora_scale.data.row_limits import MAX_ROW_BYTES
from adalora_scale.messages import quoted


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
            return bool(pc.all(pc.and_(pc.is_finite(values), pc.equal(pc.floor(values), values))).as_py())
        if _is_text(feature):
            return not pc.any(pc.equal(values, "")).as_py()
        return pa.types.is_integer(values.type) or pa.types.is_boolean(values.type)
    if column != "messages":
        return _is_text(feature) and _longest(values) <= MAX_ROW_BYTES
    turn = getattr(feature, "feature", None)
    if not isinstance(turn, dict) or not all(_is_text(turn.get(key)) for key in ("role", "content")):
        return False
    if not pc.all(pc.greater(pc.list_value_length(values), 0)).as_py():
        return False
    turns = pc.list_flatten(values)
    if turns.null_count or any(pc.struct_field(turns, key).null_count for key in ("role", "content")):
        return False
    return longest_row(dataset, name) <= MAX_ROW_BYTES


def longest_row(dataset: datasets.Dataset, name: str) -> int:
    """Return the bytes of text in the longest row of a column, the contents of a conversation's turns summed."""
    values: pa.ChunkedArray = dataset.with_format("arrow")[:][name]
    if not len(values):
        return 0
    if not pa.types.is_list(values.type) and not pa.types.is_large_list(values.type):
        return _longest(values)
    lengths = pc.fill_null(pc.binary_length(pc.struct_field(pc.list_flatten(values), "content")), 0).to_numpy()
    ends = np.cumsum(pc.fill_null(pc.list_value_length(values), 0).to_numpy())
    sums = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])[ends]
    return int(np.diff(sums, prepend=0).max())


def _longest(values: pa.ChunkedArray) -> int:
    return pc.max(pc.binary_length(values)).as_py() or 0


def _is_text(feature: Any) -> bool:
    return isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string")


def value_problem(value: Any, column: str) -> str | None:
    """Say what is wrong with one value, or None."""
    if column == "label":
        if value == "" or not isinstance(value, str | int | float) or value != value:
            return f"must be a class name or a whole number, not {quoted(value)}"
        return None if not isinstance(value, float) or value.is_integer() else f"must be whole, not {value}"
    if column != "messages":
        if not isinstance(value, str):
            return f"must be text, not {type(value).__name__}"
        return _too_long(len(value.encode(errors="replace")))
    if not isinstance(value, list) or not value:
        return f"must be a non-empty list of {{role, content}}, not {quoted(value)}"
    for index, turn in enumerate(value, start=1):
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
            return f"turn {index} must be {{role, content}} with text in both, not {quoted(turn)}"
    return _too_long(sum(len(turn["content"].encode(errors="replace")) for turn in value))


def _too_long(size: int) -> str | None:
    if size <= MAX_ROW_BYTES:
        return None
    return f"is {size:,} bytes long; split the row into several of at most {MAX_ROW_BYTES:,} bytes"
