"""Layouts of rows that people bring, each read row by row into the columns that tokenising takes.

What decides is the value that stands in a row, not a type that a reader guessed for its column; so a key may be there
in some rows and not in others, and a text that looks like a date or a number stays the text it is.

| `data.format`     | a row has                                    | becomes                                           |
|-------------------|----------------------------------------------|---------------------------------------------------|
| messages          | `messages` or `conversations`                | messages                                          |
| prompt_completion | `prompt` and `completion`, texts             | prompt_completion                                 |
| prompt_completion | `prompt` and `completion`, lists of turns    | prompt_completion_turns                           |
| preference        | `chosen`, and `prompt` or `rejected`         | one of these two: the prompt, and what was chosen |
| alpaca            | `instruction`, and `output` or `response`    | prompt_completion with the published prompt, or   |
|                   |                                              | prompt_completion_turns with data.chat_template   |
| xlam              | `query`, `tools`, `answers`: a list of calls | messages                                          |
| glaive            | `system`, `chat`: texts with USER: …         | messages                                          |
| classification    | `text` and `label`, or two texts and `label` | classification                                    |
| text              | `text`                                       | text                                              |
"""

from __future__ import annotations

from typing import Any

from adalora_scale.config import DataConfig
from adalora_scale.data.row_values import Reader, Row, label_in, text_in
from adalora_scale.data.tool_layouts import GLAIVE, XLAM, glaive_reader, xlam_reader
from adalora_scale.data.turn_layouts import (
    ALPACA,
    alpaca_reader,
    messages_column,
    messages_reader,
    pair_of_turns_reader,
    preference_reader,
)
from adalora_scale.data.turns import is_conversation

TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
)


def missing_columns(format: str, columns: list[str], config: DataConfig) -> list[str]:
    """Return which columns a format lacks, with the key that names each."""
    match format:
        case "messages":
            return [] if messages_column(columns, config) in columns else ["messages"]
        case "preference":
            needed = [] if "chosen" in columns and ({"rejected", config.prompt_column} & set(columns)) else ["chosen"]
            return needed
        case "alpaca":
            return [names[0] for names in (ALPACA[0], ALPACA[2]) if not set(names) & set(columns)]
        case "xlam":
            # Sets of questions have the other two, and texts as their answers.
            return [name for name in (*XLAM, config.tools_column or "tools") if name not in columns]
        case "glaive":
            return [name for name in (GLAIVE, config.system_column or "system") if name not in columns]
        case "classification":
            texts = _text_columns(columns, config)
            lacking = [key for key, name in zip(("text", "text_pair"), texts, strict=False) if name not in columns]
            return lacking + ([] if config.label_column in columns else ["label"])
        case "prompt_completion":
            return [key for key in ("prompt", "completion") if getattr(config, f"{key}_column") not in columns]
    return [] if config.text_column in columns else ["text"]


def reader_of(format: str, columns: list[str], first: Row, config: DataConfig) -> Reader:
    """Return how to read rows of a format.

    Args:
        format: a value of `data.format` but `auto`.
        columns: of the file; none is missing.
        first: one row, which tells conversations from texts.
        config: the `data` section.
    """
    match format:
        case "messages":
            return messages_reader(columns, config)
        case "preference":
            return preference_reader(columns, first, config)
        case "alpaca":
            return alpaca_reader(config)
        case "xlam":
            return xlam_reader(config)
        case "glaive":
            return glaive_reader(config)
        case "classification":
            return _classification(columns, config)
        case "prompt_completion":
            if is_conversation(first.get(config.prompt_column)) or is_conversation(first.get(config.completion_column)):
                return pair_of_turns_reader(config)
            names = (config.prompt_column, config.completion_column)
            return Reader(
                "prompt_completion",
                lambda row, _: {"prompt": text_in(row, names[0]), "completion": text_in(row, names[1])},
                frozenset(names),
            )
    return Reader("text", lambda row, _: {"text": text_in(row, config.text_column)}, frozenset([config.text_column]))


def user_columns(format: str, columns: list[str], config: DataConfig) -> list[str]:
    """Return the user's names of the columns that a format needs, for messages."""
    match format:
        case "messages":
            return [messages_column(columns, config)]
        case "preference":
            return ["chosen"]
        case "alpaca":
            return [next((name for name in names if name in columns), names[0]) for names in (ALPACA[0], ALPACA[2])]
        case "xlam":
            return list(XLAM)
        case "glaive":
            return [GLAIVE]
        case "classification":
            return [*_text_columns(columns, config), config.label_column]
        case "prompt_completion":
            return [config.prompt_column, config.completion_column]
    return [config.text_column]


def _text_columns(columns: list[str], config: DataConfig) -> list[str]:
    """Return the column of the text to classify, and of the second text of a pair."""
    if config.text_pair_column is not None:
        return [config.text_column, config.text_pair_column]
    if config.text_column == DataConfig.text_column and config.text_column not in columns:
        pair = next((pair for pair in TEXT_PAIRS if set(pair) <= set(columns)), None)
        if pair is not None:
            return list(pair)
        if "sentence" in columns:
            return ["sentence"]
    return [config.text_column]


def _classification(columns: list[str], config: DataConfig) -> Reader:
    texts = _text_columns(columns, config)

    def read(row: Row, _: set[str]) -> dict[str, Any]:
        named = dict(zip(("text", "text_pair"), texts, strict=False))
        label = label_in(row, config.label_column)
        return {**{key: text_in(row, name) for key, name in named.items()}, "label": label}

    return Reader("classification", read, frozenset([*texts, config.label_column]))
