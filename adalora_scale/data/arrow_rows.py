"""Rows of Arrow tables (Parquet files, the hub's data sets) as plain values, the way their JSON would give them.

An Arrow struct has all its keys in every row, null where a row had none; so null members are left out again. Columns of
mixed types are kept by the datasets library as JSON text in an extension type, which it reads with a parser that rounds
numbers; they are read here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
import pyarrow as pa

from adalora_scale.data.row_limits import parse_row


def class_names(schema: pa.Schema) -> dict[str, list[str]]:
    """Return the names of the classes of columns that the datasets library wrote as numbers of classes."""
    try:
        features = datasets.Features.from_arrow_schema(schema)
    except Exception:  # types that library does not know; no such column has classes
        return {}
    return {name: feature.names for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)}


def plain_rows(batch: pa.RecordBatch | pa.Table, names: Mapping[str, list[str]]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a batch as Python's plain values.

    Args:
        batch: any Arrow types; string views, large strings and dictionaries become text.
        names: of columns with numbers of classes, the classes' names.
    """
    columns = []
    for field in batch.schema:
        values = [_plain(value, field.type) for value in batch.column(field.name).to_pylist()]
        if (classes := names.get(field.name)) is not None:
            # Test splits without labels hold -1, which no name belongs to.
            values = [classes[v] if isinstance(v, int) and 0 <= v < len(classes) else v for v in values]
        columns.append(values)
    for row in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, row, strict=True))


def _plain(value: Any, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return parse_row("a JSON value", value)
    if pa.types.is_struct(kind):
        members = {field.name: _plain(value.get(field.name), field.type) for field in kind}
        return {name: inner for name, inner in members.items() if inner is not None}
    if pa.types.is_map(kind):
        return {key: _plain(inner, kind.item_type) for key, inner in value}
    if hasattr(kind, "value_type") and isinstance(value, list):
        return [_plain(inner, kind.value_type) for inner in value]
    return value
