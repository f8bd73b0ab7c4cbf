"""From validated rows to the tokens a trainer consumes, once among all processes of a job.

For causal language models the result is what TRL's SFTTrainer would prepare itself (its `_prepare_dataset`), to be
passed with ``dataset_kwargs={"skip_prepare_dataset": True}``: `input_ids`, `labels` (-100 where there is no loss) and,
when packed, `seq_lengths`. TRL prepares inside the trainer, where other ranks wait in a collective; here they wait for
a file lock (see `token_cache`). No process group is needed or touched.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import jinja2
import numpy as np
from trl.data_utils import common_prefix_length

from adalora_scale.config import DataConfig
from adalora_scale.data.chat_templates import resolve_chat_template
from adalora_scale.data.packing import pack
from adalora_scale.data.rows import Layout, LossTarget, RawData, loss_target
from adalora_scale.data.token_cache import build_once, dataset_digest, default_cache_dir, digest, tokenizer_digest
from adalora_scale.errors import UserError

logger = logging.getLogger(__name__)

IGNORED = -100
_FORMAT = 1  # raise when the prepared columns change, so that old caches are not taken

Batch = dict[str, list[Any]]


@dataclass(frozen=True)
class Prepared:
    """Tokenised data, read from the cache directory (memory-mapped)."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    report: dict[str, int]
    """Counts for train, and with the prefix ``eval_`` for eval: train_examples / eval_examples, dropped_empty_loss,
    truncated (among the kept), train_tokens / eval_tokens, loss_tokens, packed_sequences (0 without packing)."""


def prepare_causal_lm(
    raw: RawData, tokenizer: Any, config: DataConfig, *, seed: int, cache_dir: Path | None = None
) -> Prepared:
    """Tokenise rows for a causal language model, or load what another process or run has tokenised.

    Text and completions end with the end token; the loss covers `data.loss_on`; sequences are cut at
    `data.max_length`; examples left without a loss are dropped and counted.

    Args:
        raw: rows of `load_raw`, any layout but classification.
        tokenizer: a transformers tokenizer; it is not changed (see `resolve_chat_template` for saving the template).
        config: the `data` section.
        seed: order of the training examples before packing; without packing the file's order is kept.
        cache_dir: where prepared data is kept and the lock lives; None is `default_cache_dir()`.

    Raises:
        UserError: no chat template or end token, a conversation its template refuses, or no example has a loss.
    """
    loss = loss_target(config, raw.layout)
    template = resolve_chat_template(tokenizer, config, layout=raw.layout)
    if raw.layout != "messages" and tokenizer.eos_token is None:
        raise UserError("the tokenizer has no end token (eos_token), which must end each example; set one in it.")
    tokenize = partial(
        _tokenize_causal_lm,
        tokenizer=tokenizer,
        template=template,
        layout=raw.layout,
        loss=loss,
        max_length=config.max_length,
    )
    options = ["causal_lm", raw.layout, loss, template, config.max_length, config.packing, seed]
    return _prepare(raw, tokenizer, tokenize, config, options, seed, cache_dir)


def prepare_classification(
    raw: RawData, tokenizer: Any, config: DataConfig, *, seed: int, cache_dir: Path | None = None
) -> Prepared:
    """Tokenise texts to classify: the tokenizer's inputs and `labels`, an index into ``raw.label_names``.

    Texts are cut at `data.max_length`, or at the tokenizer's own limit where that is lower (an encoder has no
    positions beyond it).

    Args:
        raw: rows of `load_raw` with layout classification.
        tokenizer: a transformers tokenizer; it is not changed.
        config: the `data` section; `packing` is not available.
        seed: as for `prepare_causal_lm`; no step depends on it.
        cache_dir: where prepared data is kept and the lock lives; None is `default_cache_dir()`.

    Raises:
        UserError: packing is asked for.
    """
    if config.packing:
        raise UserError("data.packing=true is for task=causal_lm; set data.packing=false for classification.")
    max_length = min(config.max_length, tokenizer.model_max_length)
    tokenize = partial(_tokenize_classification, tokenizer=tokenizer, max_length=max_length)
    return _prepare(raw, tokenizer, tokenize, config, ["classification", max_length, seed], seed, cache_dir)


def _prepare(
    raw: RawData,
    tokenizer: Any,
    tokenize: Callable[..., Batch],
    config: DataConfig,
    options: list[Any],
    seed: int,
    cache_dir: Path | None,
) -> Prepared:
    parts = {"train": raw.train} | ({"eval": raw.eval} if raw.eval is not None else {})
    versions = [version(name) for name in ("transformers", "tokenizers", "trl", "datasets")]
    contents = {name: dataset_digest(dataset) for name, dataset in parts.items()}
    key = digest([_FORMAT, versions, options, contents, tokenizer_digest(tokenizer)])

    def build(directory: Path) -> None:
        report: dict[str, int] = {}
        work_dir = directory / "work"
        work_dir.mkdir()
        for name, dataset in parts.items():
            ready, counts = _prepare_part(dataset, name, tokenize, config, seed, work_dir)
            ready.save_to_disk(directory / name)
            report |= _named_counts(counts, name)
        for file in work_dir.iterdir():
            file.unlink()
        work_dir.rmdir()
        (directory / "report.json").write_text(json.dumps(report), encoding="utf-8")

    directory = build_once(cache_dir or default_cache_dir(), key, build)
    report = json.loads((directory / "report.json").read_text(encoding="utf-8"))
    _log(report)
    return Prepared(
        train=datasets.load_from_disk(directory / "train"),
        eval=datasets.load_from_disk(directory / "eval") if raw.eval is not None else None,
        report=report,
    )


def _prepare_part(
    dataset: datasets.Dataset,
    name: str,
    tokenize: Callable[..., Batch],
    config: DataConfig,
    seed: int,
    work_dir: Path,
) -> tuple[datasets.Dataset, dict[str, int]]:
    # The function holds a whole tokenizer: hashing it for datasets' own cache costs seconds and is not needed here.
    tokens = dataset.map(
        tokenize,
        batched=True,
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
    tokens = tokens.remove_columns(["length", "loss_tokens", "truncated"])
    if len(kept) < len(tokens):
        tokens = tokens.select(kept, keep_in_memory=True)
    if config.packing:
        tokens = pack(tokens, config.max_length, seed=seed if name == "train" else None, work_dir=work_dir, name=name)
        counts["packed_sequences"] = len(tokens)
    return tokens, counts


def _tokenize_causal_lm(
    batch: Batch,
    indices: list[int],
    *,
    tokenizer: Any,
    template: str | None,
    layout: Layout,
    loss: LossTarget,
    max_length: int,
) -> Batch:
    match layout:
        case "messages":
            ids, masks = _tokenize_messages(batch["messages"], indices, tokenizer, template, loss)
        case "prompt_completion":
            ends = [_with_eos(text, tokenizer.eos_token) for text in batch["completion"]]
            ids = tokenizer([p + c for p, c in zip(batch["prompt"], ends, strict=True)])["input_ids"]
            prompts = tokenizer(batch["prompt"])["input_ids"] if loss == "completion" else [[]] * len(ids)
            # Tokens may merge across the border, and a tokenizer may end the lone prompt with an end token.
            starts = [common_prefix_length(prompt, whole) for prompt, whole in zip(prompts, ids, strict=True)]
            masks = [[0] * start + [1] * (len(whole) - start) for start, whole in zip(starts, ids, strict=True)]
        case _:
            ids = tokenizer([_with_eos(text, tokenizer.eos_token) for text in batch["text"]])["input_ids"]
            masks = [[1] * len(row) for row in ids]
    labels = [
        [token if bit else IGNORED for token, bit in zip(row[:max_length], mask[:max_length], strict=True)]
        for row, mask in zip(ids, masks, strict=True)
    ]
    return {
        "input_ids": [row[:max_length] for row in ids],
        "labels": labels,
        "length": [min(len(row), max_length) for row in ids],
        # The first token is predicted by nothing, so its label is never part of the loss.
        "loss_tokens": [sum(label != IGNORED for label in row[1:]) for row in labels],
        "truncated": [len(row) > max_length for row in ids],
    }


def _tokenize_messages(
    conversations: list[Any], indices: list[int], tokenizer: Any, template: str | None, loss: LossTarget
) -> tuple[list[list[int]], list[list[int]]]:
    render = partial(
        tokenizer.apply_chat_template,
        chat_template=template,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=loss == "assistant",
    )
    try:
        output = render(conversations)
    except jinja2.TemplateError as error:
        for index, conversation in zip(indices, conversations, strict=True):
            try:
                render(conversation)
            except jinja2.TemplateError as inner:
                raise UserError(f"the chat template refuses row {index + 1}: {inner}") from None
        raise UserError(f"the chat template cannot be rendered: {error}") from None
    ids = output["input_ids"]
    return ids, output["assistant_masks"] if loss == "assistant" else [[1] * len(row) for row in ids]


def _tokenize_classification(batch: Batch, indices: list[int], *, tokenizer: Any, max_length: int) -> Batch:
    whole = [len(ids) for ids in tokenizer(batch["text"], verbose=False)["input_ids"]]
    encoded = tokenizer(batch["text"], truncation=True, max_length=max_length)
    return {
        **{name: encoded[name] for name in tokenizer.model_input_names if name in encoded},
        "labels": batch["label"],
        "length": [len(ids) for ids in encoded["input_ids"]],
        "loss_tokens": [1] * len(whole),  # one prediction a text
        "truncated": [length > max_length for length in whole],
    }


def _with_eos(text: str, eos_token: str) -> str:
    return text if text.endswith(eos_token) else text + eos_token


def _named_counts(counts: dict[str, int], name: str) -> dict[str, int]:
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


def _log(report: dict[str, int]) -> None:
    """One line, from one rank, that a user sees when data was lost."""
    if int(os.environ.get("RANK", "0")) != 0:
        return
    lost = any(value for key, value in report.items() if key.endswith(("dropped_empty_loss", "truncated")))
    line = ", ".join(f"{key} {value:,}" for key, value in report.items())
    logger.log(logging.WARNING if lost else logging.INFO, "data: %s", line)
