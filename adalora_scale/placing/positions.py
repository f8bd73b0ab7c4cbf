"""Whether rows are longer than what the base model was made for."""

from __future__ import annotations

from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc

from adalora_scale.data.preparing import Prepared

_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "seq_length")
"""What configs of transformers call it."""
_TURNED = ("rope_parameters", "rope_theta", "rotary_dim", "alibi", "relative_attention")
"""Keys of models that reckon positions and so have no table that ends."""


def longest_row(rows: datasets.Dataset) -> int:
    """Return the tokens of the longest prepared row; of packed ones, of the longest example."""
    if not len(rows):
        return 0
    if "seq_lengths" in rows.column_names:
        column = pc.list_flatten(rows.with_format("arrow")[:]["seq_lengths"])
    else:
        column = pc.list_value_length(rows.with_format("arrow")[:]["input_ids"])
    return int(pc.max(column).as_py() or 0) if isinstance(column, pa.ChunkedArray | pa.Array) else 0


def note_on_positions(max_length: int, shape: Any, data: Prepared) -> str | None:
    """Return a line where `data.max_length` is above the positions that a model's config states; else None.

    Args:
        max_length: `data.max_length`.
        shape: the model's config.
        data: the prepared rows.
    """
    text = shape.get_text_config() if hasattr(shape, "get_text_config") else shape
    found = ((name, getattr(text, name, None)) for name in _NAMES)
    key, positions = next(((name, value) for name, value in found if isinstance(value, int) and value > 0), ("", 0))
    if not positions or max_length <= positions:
        return None
    longest = max(longest_row(part) for part in (data.train, data.eval) if part is not None)
    what = f"no row is longer (the longest has {longest:,})"
    if longest > positions:
        turned = any(getattr(text, name, None) for name in _TURNED)
        end = "it was not trained for that" if turned else "it may have no position for their ends"
        what = f"the longest row has {longest:,}, and {end}; lower data.max_length to {positions}"
    return f"note: data.max_length={max_length} is above the model's {positions:,} positions ({key}); {what}"
