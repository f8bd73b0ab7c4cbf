"""From validated rows to the tokens a trainer consumes: one function a kind of model.

For causal language models the result is what TRL's SFTTrainer would prepare itself (its `_prepare_dataset`), to be
passed with ``dataset_kwargs={"skip_prepare_dataset": True}``: `input_ids`, `labels` (-100 where there is no loss) and,
when packed, `seq_lengths`. Conversations are tokenised in `conversations.py`.
"""

from __future__ import annotations

from contextlib import closing, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from trl.data_utils import common_prefix_length

from adalora_scale.config import DataConfig
from adalora_scale.data.chat_templates import resolve_chat_template
from adalora_scale.data.conversations import Conversations
from adalora_scale.data.end_tokens import once, prompt_tokens, with_end
from adalora_scale.data.preparing import Batch, Prepared, prepare
from adalora_scale.data.row_values import Layout
from adalora_scale.data.rows import LossTarget, RawData, loss_target
from adalora_scale.data.streaming import SHUFFLED, Tokenize, TokenStream
from adalora_scale.errors import UserError

IGNORED = -100


def prepare_language_model(
    raw: RawData, tokenizer: Any, config: DataConfig, *, seed: int, cache_dir: Path | None = None
) -> Prepared:
    """Tokenise rows for a causal language model, or load what another process or run has tokenised.

    Text and completions end with the end token; the loss covers `data.loss_on`; sequences are cut at
    `data.max_length`; examples left without a loss are dropped and counted.

    Args:
        raw: rows of `load_raw`, any layout but classification.
        tokenizer: a transformers tokenizer; it is not changed (see `resolve_chat_template` for saving the template).
        config: the `data` section.
        seed: order of the training examples before packing, and of a stream's; without either the file's order is kept.
        cache_dir: where prepared data is kept and the lock lives; None is `default_cache_dir()`.

    Raises:
        UserError: no chat template or end token, a conversation its template refuses, or no example has a loss.
    """
    loss = loss_target(config, raw.layout)
    template = resolve_chat_template(tokenizer, config, layout=raw.layout, tools="tools" in raw.train.column_names)
    options = ["language_model", raw.layout, loss, template, config.max_length, config.packing, seed]
    if template is not None:
        # Of a stream the first rows alone are known; a later one may call a tool.
        conversations = Conversations(tokenizer, template, loss, calls=bool(raw.streamed) or raw.has_calls())
        tokenize = partial(_tokenize_conversations, conversations=conversations, max_length=config.max_length)
        with closing(conversations) if not raw.streamed else nullcontext():  # a stream renders until the run ends
            return _with_stream(
                prepare(raw, tokenizer, tokenize, config, options, seed, cache_dir), tokenize, raw, config, seed
            )
    if tokenizer.eos_token is None:
        raise UserError("the tokenizer has no end token (eos_token), which must end each example; set one in it.")
    texts = partial(_tokenize_texts, tokenizer=tokenizer, layout=raw.layout, loss=loss, max_length=config.max_length)
    return _with_stream(prepare(raw, tokenizer, texts, config, options, seed, cache_dir), texts, raw, config, seed)


def _with_stream(prepared: Prepared, tokenize: Tokenize, raw: RawData, config: DataConfig, seed: int) -> Prepared:
    """Put the stream beside the first rows, where rows are streamed."""
    if not raw.streamed:
        return prepared
    buffer = SHUFFLED if config.shuffle_buffer is None else config.shuffle_buffer
    stream = TokenStream(raw.streamed, raw.mixing, tokenize, buffer=buffer, seed=seed)
    return replace(prepared, mixture=None, stream=stream)


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
        seed: as for `prepare_language_model`; no step depends on it.
        cache_dir: where prepared data is kept and the lock lives; None is `default_cache_dir()`.

    Raises:
        UserError: packing is asked for.
    """
    if config.packing:
        raise UserError("data.packing=true is for language models; set data.packing=false for classification.")
    max_length = min(config.max_length, tokenizer.model_max_length)
    tokenize = partial(_tokenize_classification, tokenizer=tokenizer, max_length=max_length)
    return prepare(raw, tokenizer, tokenize, config, ["classification", max_length, seed], seed, cache_dir)


def _tokenize_conversations(
    batch: Batch, indices: list[int], *, conversations: Conversations, max_length: int
) -> Batch:
    ids, masks, notes = conversations.tokenize(batch, [f"row {index + 1}" for index in indices])
    return _with_labels(ids, masks, max_length) | {"notes": notes}


def _tokenize_texts(
    batch: Batch, indices: list[int], *, tokenizer: Any, layout: Layout, loss: LossTarget, max_length: int
) -> Batch:
    if layout == "prompt_completion":
        ends = [with_end(text, tokenizer.eos_token) for text in batch["completion"]]
        ids = tokenizer([p + c for p, c in zip(batch["prompt"], ends, strict=True)])["input_ids"]
        prompts = prompt_tokens(tokenizer, batch["prompt"]) if loss == "completion" else [[]] * len(ids)
    else:
        ids = tokenizer([with_end(text, tokenizer.eos_token) for text in batch["text"]])["input_ids"]
        prompts = [[]] * len(ids)
    ids = [once(tokenizer, row, [0] * len(row))[0] for row in ids]
    # Tokens may merge across the border of prompt and completion.
    starts = [common_prefix_length(prompt, whole) for prompt, whole in zip(prompts, ids, strict=True)]
    masks = [[0] * start + [1] * (len(whole) - start) for start, whole in zip(starts, ids, strict=True)]
    return _with_labels(ids, masks, max_length)


def _with_labels(ids: list[list[int]], masks: list[list[int]], max_length: int) -> Batch:
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


def _tokenize_classification(batch: Batch, indices: list[int], *, tokenizer: Any, max_length: int) -> Batch:
    texts = [batch["text"], *([batch["text_pair"]] if "text_pair" in batch else [])]
    whole = [len(ids) for ids in tokenizer(*texts, verbose=False)["input_ids"]]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    return {
        **{name: encoded[name] for name in tokenizer.model_input_names if name in encoded},
        "labels": batch["label"],
        "length": [len(ids) for ids in encoded["input_ids"]],
        "loss_tokens": [1] * len(whole),  # one prediction a text
        "truncated": [length > max_length for length in whole],
    }
