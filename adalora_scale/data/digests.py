"""Digests of rows and tokenizers, the same whatever files, caches and machines they came through."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa

_ROWS_PER_HASH = 1000
_ROWS_OF_FINGERPRINT = 4096  # checkpoints hold fingerprints: another number would refuse to go on from them


def digest(parts: Any) -> str:
    """Return a hexadecimal digest of a JSON-like value."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def dataset_digest(dataset: datasets.Dataset) -> str:
    """Return a digest of the rows themselves: unlike a datasets fingerprint it does not depend on paths or times."""
    state = hashlib.blake2b(digest_size=16)
    state.update(repr(sorted(dataset.features.items())).encode())
    for table in dataset.with_format("arrow").iter(batch_size=_ROWS_PER_HASH):
        # Chunks joined and schema metadata dropped, so that equal rows give equal bytes however they were read.
        table = table.combine_chunks().replace_schema_metadata(None)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        state.update(sink.getvalue())
    return state.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of what decides a tokenizer's output, its chat template aside."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # State left by earlier calls with padding or truncation, which every call sets anew.
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        with tempfile.TemporaryDirectory() as directory:
            tokenizer.save_pretrained(directory)
            content = {
                path.name: hashlib.blake2b(path.read_bytes()).hexdigest()
                for path in sorted(Path(directory).rglob("*"))
                if path.is_file()
            }
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    sides = [tokenizer.padding_side, tokenizer.truncation_side]
    return digest([type(tokenizer).__name__, content, special, sides, sorted(tokenizer.model_input_names)])


def data_fingerprint(dataset: Any) -> str:
    """Return a digest of every row and its place, 16 hex digits; empty for data that cannot be read by position."""
    if not (hasattr(dataset, "with_format") and hasattr(dataset, "__len__")):
        return ""
    digest = hashlib.sha256(str(len(dataset)).encode())
    rows = dataset.with_format("arrow")
    for start in range(0, len(dataset), _ROWS_OF_FINGERPRINT):
        table: pa.Table = rows[start : start + _ROWS_OF_FINGERPRINT]
        for name in sorted(table.column_names):
            # A slice may begin inside Arrow's buffers; a record batch written out holds its own values only.
            column = pa.table({name: table.column(name).combine_chunks()})
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, column.schema) as writer:
                writer.write_table(column)
            digest.update(sink.getvalue())
    return digest.hexdigest()[:16]
