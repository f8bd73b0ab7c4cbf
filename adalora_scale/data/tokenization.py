"""From validated rows to the tokens a trainer consumes: one function a kind of model.

For causal language models the result is what TRL's SFTTrainer would prepare itself (its `_prepare_dataset`), to be
passed with ``dataset_kwargs={"skip_prepare_dataset": True}``: `input_ids`, `labels` (-100 where there is no loss) and,
when packed, `seq_lengths`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from trl.data_utils import common_prefix_length

from adalora_scale.config import DataConfig
from adalora_scale.data.chat_templates import assistant_masks, resolve_chat_template
from adalora_scale.data.preparing import Batch, Prepared, prepare
from adalora_scale.data.rendering import Renderer, is_known
from adalora_scale.data.rows import Layout, LossTarget, RawData, loss_target
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
        _tokenize_language,
        tokenizer=tokenizer,
        template=template,
        layout=raw.layout,
        loss=loss,
        max_length=config.max_length,
    )
    options = ["language_model", raw.layout, loss, template, config.max_length, config.packing, seed]
    if template is None or is_known(template):
        return prepare(raw, tokenizer, tokenize, config, options, seed, cache_dir)
    with Renderer(template, {name: str(token) for name, token in tokenizer.special_tokens_map.items()}) as renderer:
        return prepare(raw, tokenizer, partial(tokenize, renderer=renderer), config, options, seed, cache_dir)


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


def _tokenize_language(
    batch: Batch,
    indices: list[int],
    *,
    tokenizer: Any,
    template: str | None,
    layout: Layout,
    loss: LossTarget,
    max_length: int,
    renderer: Renderer | None = None,
) -> Batch:
    match layout:
        case "messages" if renderer is not None:
            ids, masks = _tokenize_rendered(batch["messages"], indices, tokenizer, renderer, loss)
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


def _tokenize_rendered(
    conversations: list[Any], indices: list[int], tokenizer: Any, renderer: Renderer, loss: LossTarget
) -> tuple[list[list[int]], list[list[int]]]:
    """Do what `_tokenize_messages` does with a template that needs limits."""
    rendered = renderer.render(conversations, [f"row {index + 1}" for index in indices])
    texts, spans = [text for text, _ in rendered], [spans for _, spans in rendered]
    if loss == "assistant":
        return assistant_masks(tokenizer, texts, spans)
    ids = tokenizer(texts, add_special_tokens=False, padding=False, truncation=False)["input_ids"]
    return ids, [[1] * len(row) for row in ids]


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
