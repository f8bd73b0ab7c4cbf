"""Whether a base model has a row in its embedding for every token that a run is going to show it.

A token beyond the table is an IndexError in the first step, or on a GPU an assert of the device that names nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn

from adalora_scale.config import RunConfig
from adalora_scale.data.preparing import Prepared
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.messages import quoted, say
from adalora_scale.placing import streaming
from adalora_scale.quantization.base_files import BaseFiles
from adalora_scale.quantization.naming import match_names
from adalora_scale.reading.base_config import foreign, said_of
from adalora_scale.tasks.vocabulary import rows_for, token_table

_COLUMN = "input_ids"
_NAMED = ("pad_token", "bos_token", "eos_token", "unk_token", "cls_token", "sep_token")


def require_rows(
    config: RunConfig, tokenizer: Any, data: Prepared, label_names: list[str] | None, *, main: bool = True
) -> int | None:
    """See that the base's embedding has rows for the tokens of the rows and for the tokenizer's special ones.

    With `model.resize_token_embeddings` it is given those that lack, for all tokens of the tokenizer.

    Special tokens of other names than padding, beginning and end are named, once, where only they are beyond: no row
    of this run holds them.

    Args:
        config: the run's.
        tokenizer: as rows were prepared with.
        data: the prepared rows.
        label_names: of a classifier.
        main: whether this process names what is only worth a note.

    Returns:
        The rows that the embedding must be given; None where it has enough.

    Raises:
        UserError: a token has no row and may not get one.
        Unsupported: it may, and the model has no embedding of tokens.
    """
    table = _table(config, label_names)
    resize = config.model.resize_token_embeddings
    if table is None:
        if resize:
            raise Unsupported("model.resize_token_embeddings: the model has no embedding of tokens; remove the key.")
        return None
    name, rows = table
    earlier = _rows_of_start(config, name)
    largest = max((largest_token(part) for part in (data.train, data.eval) if part is not None), default=-1)
    found = [(largest, "the rows of data")]
    for name in _NAMED:
        if isinstance(number := getattr(tokenizer, f"{name}_id", None), int):
            found.append((number, f"the tokenizer's {name}"))
    if resize:
        return _enlarged(tokenizer, rows, max(number for number, _ in found), earlier, main=main)
    if earlier > rows:
        raise UserError(
            f"model.adapter_path={config.model.adapter_path} has {earlier} embeddings, the base {rows}: set "
            f"model.resize_token_embeddings=true."
        )
    beyond = [(number, where) for number, where in found if number >= rows]
    if beyond:
        number, where = beyond[0]
        raise UserError(
            f"token {number} ({quoted(tokenizer.convert_ids_to_tokens(number))}, of {where}) has no embedding: "
            f"{config.model.model_name_or_path} has {rows} (0 to {rows - 1}). Name the tokenizer that belongs to the "
            f"model in model.tokenizer_name_or_path, or set model.resize_token_embeddings=true to add rows, which are "
            f"trained and saved with the adapter."
        )
    if main and (unused := [number for number in _special(tokenizer) if number >= rows]):
        token = quoted(tokenizer.convert_ids_to_tokens(unused[0]))
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        say(f"note: the tokenizer's {token}{more} has no embedding in the model ({rows}); no row of this run holds it")
    return None


def _enlarged(tokenizer: Any, rows: int, largest: int, earlier: int, *, main: bool) -> int | None:
    """Return how many rows embedding and head get so that each token has one: here, and in the earlier adapter."""
    tokens = max(largest + 1, len(tokenizer), *(number + 1 for number in _special(tokenizer)))
    if tokens <= rows and earlier <= rows:
        if main:
            say(f"model.resize_token_embeddings=true: every token has one of the {rows} rows, so none is added")
        return None
    wanted = max(rows_for(tokens) if tokens > rows else rows, earlier)
    if main:
        say(
            f"embedding and output head: {wanted - rows} rows added to {rows} for the tokens from {rows} on; both are "
            f"trained in full and saved with the adapter"
        )
    return wanted


def _rows_of_start(config: RunConfig, embedding: str) -> int:
    """Return the rows of the embedding in the adapter that the run starts from; 0 without one."""
    if not config.model.adapter_path:
        return 0
    held = AdapterFile(config.model.adapter_path).others.get(embedding)
    return held[0] if held else 0


def embedding_rows(config: RunConfig, label_names: list[str] | None = None) -> int | None:
    """Return the rows of the base's embedding as its files have them, or as its config says; None without a table."""
    table = _table(config, label_names)
    return None if table is None else table[1]


def _table(config: RunConfig, label_names: list[str] | None) -> tuple[str, int] | None:
    with foreign(f"model.model_name_or_path={config.model.model_name_or_path}"):
        model = streaming.build_on_meta(config, streaming.shape_of_base(config.model), torch.float32, label_names)
    if (table := token_table(model)) is None:
        return None
    name = f"{table[0]}.weight"
    return name, _stored_rows(config, model, name) or table[1].num_embeddings


def largest_token(rows: datasets.Dataset) -> int:
    """Return the largest token of prepared rows, -1 where there is none."""
    if _COLUMN not in rows.column_names or not len(rows):
        return -1
    column = rows.with_format("arrow")[_COLUMN]
    chunks: Iterable[Any] = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    largest = (pc.max(pc.list_flatten(chunk)).as_py() for chunk in chunks)
    return max((number for number in largest if number is not None), default=-1)


def _special(tokenizer: Any) -> list[int]:
    return sorted({number for number in getattr(tokenizer, "all_special_ids", []) if isinstance(number, int)})


def _stored_rows(config: RunConfig, model: nn.Module, name: str) -> int | None:
    with said_of(config.model.model_name_or_path):
        files = BaseFiles.open(config.model.model_name_or_path, config.model.revision)
    try:
        source = match_names(model, files.tensors).tensors.get(name)
    except Unsupported:  # another tensor is converted while loading; the config must do
        return None
    return None if source is None else files.tensors[source].shape[0]
