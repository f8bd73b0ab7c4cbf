"""Tokenised data, prepared once among all processes of a job, counted, and kept for later runs.

TRL prepares inside the trainer, where other ranks wait in a collective; here they wait for a file lock (see
`token_cache`). No process group is needed or touched.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from adalora_scale.config import DataConfig
from adalora_scale.data.digests import dataset_digest, digest, tokenizer_digest
from adalora_scale.data.mixing import Mixing, Mixture
from adalora_scale.data.packing import pack
from adalora_scale.data.row_limits import MAX_ROW_BYTES
from adalora_scale.data.rows import RawData
from adalora_scale.data.streaming import TokenStream
from adalora_scale.data.token_cache import build_once, default_cache_dir
from adalora_scale.errors import UserError
from adalora_scale.process_rank import process_rank

logger = logging.getLogger(__name__)

_FORMAT = 2  # raise when the prepared columns change, so that old caches are not taken

Batch = dict[str, list[Any]]


@dataclass(frozen=True)
class Prepared:
    """Tokenised data, read from the cache directory (memory-mapped)."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    report: dict[str, int]
    """Counts for train, and with the prefix ``eval_`` for eval: train_examples / eval_examples, dropped_empty_loss,
    truncated (among the kept), train_tokens / eval_tokens, loss_tokens, packed_sequences (0 without packing)."""
    contents: dict[str, str] = field(default_factory=dict)
    """Digests of the rows that were read, `train` and perhaps `eval`: the same for the same rows, wherever they lay."""
    key: str = ""
    """Digest of the contents and of everything else that decides the tokens."""
    mixture: Mixture | None = None
    """The order in which `train` is drawn from where sources are mixed; None: it is shuffled as a whole."""
    stream: TokenStream | None = None
    """Streaming: what is trained on; `train` then holds the first rows of each source, and its counts are named so."""


def prepare(
    raw: RawData,
    tokenizer: Any,
    tokenize: Callable[..., Batch],
    config: DataConfig,
    options: list[Any],
    seed: int,
    cache_dir: Path | None,
) -> Prepared:
    """Tokenise, drop rows without a loss, pack and count; or load what another process or run has prepared.

    Args:
        raw: rows of `load_raw`.
        tokenizer: a transformers tokenizer.
        tokenize: a function of a batch and its rows' numbers, for `datasets.map`; beside the trainer's columns it
            gives `length`, `loss_tokens` and `truncated` of each row, and may give `notes`, lines that are said once.
        config: the `data` section.
        options: what else decides the tokens, as JSON; part of the cache's key.
        seed: order of the training examples before packing.
        cache_dir: where prepared data is kept and the lock lives; None is `default_cache_dir()`.

    Raises:
        UserError: no example has a loss.
    """
    parts = {"train": raw.train} | ({"eval": raw.eval} if raw.eval is not None else {})
    versions = [version(name) for name in ("transformers", "tokenizers", "trl", "datasets")]
    contents = {name: dataset_digest(dataset) for name, dataset in parts.items()}
    borders = [raw.mixing.starts()] if raw.mixing is not None else []
    key = digest([_FORMAT, versions, options, contents, tokenizer_digest(tokenizer), *borders])

    def build(directory: Path) -> None:
        report: dict[str, int] = {}
        notes: dict[str, list[str]] = {}
        kept: dict[str, list[tuple[int, int]]] = {}
        work_dir = directory / "work"
        work_dir.mkdir()
        for name, dataset in parts.items():
            mixing = raw.mixing if name == "train" else None
            ready, counts, notes[name], kept[name] = _prepare_part(
                dataset, name, tokenize, config, seed, work_dir, mixing
            )
            ready.save_to_disk(directory / name)
            report |= _named_counts(counts, "first_rows" if raw.streamed and name == "train" else name)
        for file in work_dir.iterdir():
            file.unlink()
        work_dir.rmdir()
        for file_name, tree in (("report", report), ("notes", notes), ("kept", kept)):
            (directory / f"{file_name}.json").write_text(json.dumps(tree), encoding="utf-8")

    directory = build_once(cache_dir or default_cache_dir(), key, build)
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    _log(report, json.loads((directory / "notes.json").read_text(encoding="utf-8")))
    train = datasets.load_from_disk(directory / "train")
    mixture = None
    if raw.mixing is not None:
        mixture = _mixture(
            raw.mixing, train, json.loads((directory / "kept.json").read_text(encoding="utf-8"))["train"]
        )
    return Prepared(
        train=train,
        eval=datasets.load_from_disk(directory / "eval") if raw.eval is not None else None,
        report=report,
        contents=contents,
        key=key,
        mixture=mixture,
    )


def _mixture(mixing: Mixing, train: datasets.Dataset, kept: list[tuple[int, int]]) -> Mixture:
    """Return the order over prepared rows, or over sequences; `kept`: rows and sequences of each part."""
    rows_of = np.ones(len(train), dtype=np.int64)
    if "seq_lengths" in train.column_names:
        rows_of = pc.list_value_length(train.with_format("arrow")[:]["seq_lengths"]).to_numpy().astype(np.int64)
    ends = np.cumsum([items for _, items in kept])[:-1]
    return Mixture(mixing.with_rows([rows for rows, _ in kept]), np.split(rows_of, ends))


def _prepare_part(
    dataset: datasets.Dataset,
    name: str,
    tokenize: Callable[..., Batch],
    config: DataConfig,
    seed: int,
    work_dir: Path,
    mixing: Mixing | None,
) -> tuple[datasets.Dataset, dict[str, int], list[str], list[tuple[int, int]]]:
    """Return tokens, counts, notes, and the rows that were kept of each part and the sequences that they fill."""
    # The function holds a whole tokenizer: hashing it for datasets' own cache costs seconds and is not needed here.
    tokens = dataset.map(
        tokenize,
        batched=True,
        batch_size=_rows_at_once(dataset),
        with_indices=True,
        remove_columns=dataset.column_names,
        num_proc=config.preprocessing_num_workers,
        cache_file_name=str(work_dir / f"{name}.arrow"),
        load_from_cache_file=False,
        new_fingerprint=f"{name}-tokens",
        desc=f"Tokenizing {name}",
    )
    counted = tokens.select_columns(["length", "loss_tokens", "truncated"]).with_format("numpy")[:]
    kept = np.flatnonzero(counted["loss_tokens"] > 0)
    if not len(kept):
        raise UserError(_explain_empty(name, counted["truncated"], config))
    counts = {
        "examples": len(kept),
        "dropped_empty_loss": len(tokens) - len(kept),
        "truncated": int(counted["truncated"][kept].sum()),
        "tokens": int(counted["length"][kept].sum()),
        "loss_tokens": int(counted["loss_tokens"][kept].sum()),
        "packed_sequences": 0,
    }
    notes = _noted(tokens)
    tokens = tokens.remove_columns(list({"length", "loss_tokens", "truncated", "notes"} & set(tokens.column_names)))
    if len(kept) < len(tokens):
        tokens = tokens.select(kept, keep_in_memory=True)
    borders = mixing.starts() if mixing is not None else [0, len(counted["loss_tokens"])]
    rows_of: list[int] = np.diff(np.searchsorted(kept, borders)).tolist()
    items_of = rows_of
    if mixing is not None:
        mixing.with_rows(rows_of)
    if config.packing:
        # Each source by itself: a sequence that holds rows of several could not keep to their shares.
        pieces, start = [], 0
        for number, rows in enumerate(rows_of):
            piece = tokens.select(range(start, start + rows)) if len(rows_of) > 1 else tokens
            file = f"{name}-{number}" if number else name
            pack_seed = seed if name == "train" else None
            pieces.append(pack(piece, config.max_length, seed=pack_seed, work_dir=work_dir, name=file))
            start += rows
        tokens = datasets.concatenate_datasets(pieces)
        counts["packed_sequences"] = len(tokens)
        items_of = [len(piece) for piece in pieces]
    return tokens, counts, notes, list(zip(rows_of, items_of, strict=True))


def _noted(tokens: datasets.Dataset) -> list[str]:
    """Return what was noted of rows, each with the number of rows and the first."""
    if "notes" not in tokens.column_names:
        return []
    rows: dict[str, list[int]] = {}
    for number, notes in enumerate(tokens["notes"], start=1):
        for note in notes.splitlines():
            rows.setdefault(note, []).append(number)
    return [
        f"{note} (row {numbers[0]}" + (f" and {len(numbers) - 1:,} more)" if numbers[1:] else ")")
        for note, numbers in rows.items()
    ]


def _rows_at_once(dataset: datasets.Dataset) -> int:
    """Return how many rows to tokenise together: 1,000, fewer where rows are so long that they would not fit."""
    table = dataset.with_format("arrow")[:]
    texts = [table[field.name] for field in table.schema if pa.types.is_large_string(field.type)]
    longest = max(1, sum(pc.max(pc.binary_length(text)).as_py() or 0 for text in texts))
    return max(1, min(1000, 2 * MAX_ROW_BYTES // longest))


def _named_counts(counts: dict[str, int], name: str) -> dict[str, int]:
    if name == "first_rows":
        return {f"first_rows_{key}": value for key, value in counts.items() if key != "packed_sequences"}
    prefixed = {"examples": f"{name}_examples", "tokens": f"{name}_tokens"}
    other = "" if name == "train" else f"{name}_"
    return {prefixed.get(key, other + key): value for key, value in counts.items()}


def _explain_empty(name: str, truncated: np.ndarray, config: DataConfig) -> str:
    if truncated.any():
        cause = (
            f"{int(truncated.sum())} were cut at data.max_length={config.max_length} before any token with a loss; "
            "raise data.max_length"
        )
    else:
        cause = (
            "the completions or assistant turns are empty, or the chat template's {% generation %} marks enclose "
            "nothing; check a row, the template, and data.loss_on"
        )
    return f"none of the {len(truncated)} {name} examples has a token that counts in the loss: {cause}."


def _log(report: dict[str, int], notes: dict[str, list[str]]) -> None:
    """One line, from one rank, that a user sees when data was lost; and what a template leaves out, once each."""
    if process_rank() != 0:
        return
    for name, found in notes.items():
        for note in found:
            logger.warning("data: %s: %s", name, note)
    lost = any(value for key, value in report.items() if key.endswith(("dropped_empty_loss", "truncated")))
    line = ", ".join(f"{key} {value:,}" for key, value in report.items())
    logger.log(logging.WARNING if lost else logging.INFO, "data: %s", line)
