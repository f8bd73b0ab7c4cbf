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
from adalora_scale.messages import quoted, say
from adalora_scale.placing import streaming
from adalora_scale.quantization.base_files import BaseFiles
from adalora_scale.quantization.naming import match_names
from adalora_scale.reading.base_config import foreign, said_of

_COLUMN = "input_ids"
_NAMED = ("pad_token", "bos_token", "eos_token", "unk_token", "cls_token", "sep_token")


def require_rows(
    config: RunConfig, tokenizer: Any, data: Prepared, label_names: list[str] | None, *, main: bool = True
) -> None:
    """See that the base's embedding has rows for the tokens of the rows and for the tokenizer's special ones.

    Special tokens of other names than padding, beginning and end are named, once, where only they are beyond: no row
    of this run holds them.

    Args:
        config: the run's.
        tokenizer: as rows were prepared with.
        data: the prepared rows.
        label_names: of a classifier.
        main: whether this process names what is only worth a note.

    Raises:
        UserError: a token has no row.
    """
    rows = embedding_rows(config, label_names)
    if rows is None:
        return
    largest = max((largest_token(part) for part in (data.train, data.eval) if part is not None), default=-1)
    found = [(largest, "the rows of data")]
    for name in _NAMED:
        if isinstance(number := getattr(tokenizer, f"{name}_id", None), int):
            found.append((number, f"the tokenizer's {name}"))
    beyond = [(number, where) for number, where in found if number >= rows]
    if beyond:
        number, where = beyond[0]
        raise UserError(
            f"token {number} ({quoted(tokenizer.convert_ids_to_tokens(number))}, of {where}) has no embedding: "
            f"{config.model.model_name_or_path} has {rows} (0 to {rows - 1}). Name the tokenizer that belongs to the "
            f"model in model.tokenizer_name_or_path, or enlarge the model once (transformers' "
            f"resize_token_embeddings({number + 1}), then save_pretrained) and name that."
        )
    if main and (unused := [number for number in _special(tokenizer) if number >= rows]):
        token = quoted(tokenizer.convert_ids_to_tokens(unused[0]))
        more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
        say(f"note: the tokenizer's {token}{more} has no embedding in the model ({rows}); no row of this run holds it")


def embedding_rows(config: RunConfig, label_names: list[str] | None = None) -> int | None:
    """Return the rows of the base's embedding as its files have them, or as its config says; None without a table."""
    with foreign(f"model.model_name_or_path={config.model.model_name_or_path}"):
        model = streaming.build_on_meta(config, streaming.shape_of_base(config.model), torch.float32, label_names)
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if callable(getter) else None
    except NotImplementedError:
        return None
    if not isinstance(embedding, nn.Embedding):
        return None
    return _stored_rows(config, model, embedding) or embedding.num_embeddings


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


def _stored_rows(config: RunConfig, model: nn.Module, embedding: nn.Module) -> int | None:
    name = next((f"{path}.weight" for path, module in model.named_modules() if module is embedding), "")
    with said_of(config.model.model_name_or_path):
        files = BaseFiles.open(config.model.model_name_or_path, config.model.revision)
    try:
        source = match_names(model, files.tensors).tensors.get(name)
    except Unsupported:  # another tensor is converted while loading; the config must do
        return None
    return None if source is None else files.tensors[source].shape[0]
