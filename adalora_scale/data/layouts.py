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
| classification    | `text` and `label`, or two texts and `label` | classification                                    |
| text              | `text`                                       | text                                              |
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from adalora_scale.config import DataConfig
from adalora_scale.data.row_limits import MAX_ROW_BYTES
from adalora_scale.data.turns import (
    Turn,
    Unfit,
    conversation,
    document_list,
    is_conversation,
    template_variables,
    tool_list,
)
from adalora_scale.messages import quoted

Layout = Literal["messages", "prompt_completion", "prompt_completion_turns", "text", "classification"]
"""What tokenising takes."""
Row = Mapping[str, Any]

COLUMNS: dict[Layout, dict[str, str]] = {
    "messages": dict.fromkeys(("messages", "tools", "documents", "chat_template_kwargs"), "json"),
    "prompt_completion": dict.fromkeys(("prompt", "completion"), "string"),
    "prompt_completion_turns": {
        **dict.fromkeys(("messages", "tools", "documents", "chat_template_kwargs"), "json"),
        "prompt_turns": "int64",
    },
    "classification": dict.fromkeys(("text", "text_pair", "label"), "string"),
    "text": {"text": "string"},
}
"""Columns of each layout and their types: text, whole numbers, and JSON of any shape."""

CONVERSATIONS: tuple[Layout, ...] = ("messages", "prompt_completion_turns")
"""Layouts that a chat template renders."""

TEXT_PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
)
_ALPACA = (("instruction",), ("input", "context"), ("output", "response"))
_ALPACA_HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_ALPACA_HEAD_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


class BadColumn(Exception):
    """A row's value that cannot be used: the column, and what is wrong."""

    def __init__(self, column: str, problem: str) -> None:
        super().__init__(f"column '{column}' {problem}")


@dataclass(frozen=True)
class Reader:
    """How rows of one file become rows of a layout."""

    layout: Layout
    read: Callable[[Row, set[str]], dict[str, Any]]
    """Gives a row's columns and adds what was left unused, in words; raises `BadColumn`."""
    used: frozenset[str]
    """The columns that it looks at."""
    notes: tuple[str, ...] = field(default=())
    """What is said of every row, in words."""


def missing_columns(format: str, columns: list[str], config: DataConfig) -> list[str]:
    """Return which columns a format lacks, with the key that names each."""
    match format:
        case "messages":
            return [] if _messages_column(columns, config) in columns else ["messages"]
        case "preference":
            needed = [] if "chosen" in columns and ({"rejected", config.prompt_column} & set(columns)) else ["chosen"]
            return needed
        case "alpaca":
            return [names[0] for names in (_ALPACA[0], _ALPACA[2]) if not set(names) & set(columns)]
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
            return _messages(columns, config)
        case "preference":
            return _preference(columns, first, config)
        case "alpaca":
            return _alpaca(columns, config)
        case "classification":
            return _classification(columns, config)
        case "prompt_completion":
            if is_conversation(first.get(config.prompt_column)) or is_conversation(first.get(config.completion_column)):
                return _pair_of_turns(columns, config)
            names = (config.prompt_column, config.completion_column)
            return Reader(
                "prompt_completion",
                lambda row, _: {"prompt": _text(row, names[0]), "completion": _text(row, names[1])},
                frozenset(names),
            )
    return Reader("text", lambda row, _: {"text": _text(row, config.text_column)}, frozenset([config.text_column]))


def user_columns(format: str, columns: list[str], config: DataConfig) -> list[str]:
    """Return the user's names of the columns that a format needs, for messages."""
    match format:
        case "messages":
            return [_messages_column(columns, config)]
        case "preference":
            return ["chosen"]
        case "alpaca":
            return [next((name for name in names if name in columns), names[0]) for names in (_ALPACA[0], _ALPACA[2])]
        case "classification":
            return [*_text_columns(columns, config), config.label_column]
        case "prompt_completion":
            return [config.prompt_column, config.completion_column]
    return [config.text_column]


# ---- conversations ------------------------------------------------------------------------------------------------


def _messages_column(columns: list[str], config: DataConfig) -> str:
    default = DataConfig.messages_column
    others = (name for name in ("conversations", "conversation") if name in columns)
    if config.messages_column == default and default not in columns:
        return next(others, default)
    return config.messages_column


class _Surroundings:
    """What stands beside a conversation in its row: a system text, tools, documents, variables of the template."""

    def __init__(self, columns: list[str], config: DataConfig) -> None:
        wanted: dict[str, tuple[str | None, Callable[[Any], Any]]] = {
            "tools": (config.tools_column, tool_list),
            "documents": (config.documents_column, document_list),
            "chat_template_kwargs": ("chat_template_kwargs", template_variables),
        }
        self._found = {key: (name, parse) for key, (name, parse) in wanted.items() if name in columns}
        if config.tools_column == "tools" and "tools" not in columns and "functions" in columns:  # OpenAI's older name
            self._found["tools"] = ("functions", tool_list)
        self._system = config.system_column if config.system_column in columns else None
        self.used = frozenset([*(str(name) for name, _ in self._found.values()), *filter(None, [self._system])])

    def read(self, row: Row) -> dict[str, str | None]:
        read: dict[str, str | None] = {}
        for key, (name, parse) in self._found.items():
            value = _in_column(str(name), lambda name=name, parse=parse: parse(row.get(str(name))))  # type: ignore[misc]
            read[key] = None if value is None else _json(str(name), value)
        return read

    def with_system(self, row: Row, turns: list[Turn], notes: set[str]) -> list[Turn]:
        text = row.get(self._system) if self._system else None
        if text is None or text == "":
            return turns
        if not isinstance(text, str):
            raise BadColumn(str(self._system), f"must be text, not {type(text).__name__}")
        if turns[0]["role"] not in ("system", "developer"):
            return [{"role": "system", "content": text}, *turns]
        if turns[0].get("content") != text:
            notes.add(f"column '{self._system}' of rows whose turns begin with a system turn of their own")
        return turns


def _messages(columns: list[str], config: DataConfig) -> Reader:
    column, beside = _messages_column(columns, config), _Surroundings(columns, config)

    def read(row: Row, notes: set[str]) -> dict[str, Any]:
        turns = _in_column(column, lambda: conversation(_there(row, column), notes))
        return {"messages": _json(column, beside.with_system(row, turns, notes)), **beside.read(row)}

    return Reader("messages", read, beside.used | {column})


def _pair_of_turns(columns: list[str], config: DataConfig) -> Reader:
    names, beside = (config.prompt_column, config.completion_column), _Surroundings(columns, config)

    def read(row: Row, notes: set[str]) -> dict[str, Any]:
        prompt, completion = (
            _in_column(name, lambda name=name: conversation(_there(row, name), notes)) for name in names
        )  # type: ignore[misc]
        return _turns_apart(names[1], beside, row, prompt, completion, notes)

    return Reader("prompt_completion_turns", read, beside.used | set(names))


def _turns_apart(
    column: str, beside: _Surroundings, row: Row, prompt: list[Turn], completion: list[Turn], notes: set[str]
) -> dict[str, Any]:
    if not any(turn["role"] == "assistant" for turn in completion):
        raise BadColumn(column, "has no turn of the assistant's, so there is nothing to train on")
    prompt = beside.with_system(row, prompt, notes)
    turns = _json(column, [*prompt, *completion])
    return {"messages": turns, "prompt_turns": len(prompt), **beside.read(row)}


def _preference(columns: list[str], first: Row, config: DataConfig) -> Reader:
    """What is chosen is trained on; TRL's two forms, with a prompt of its own or the common beginning as the prompt."""
    note = "column 'rejected' (this is supervised training: it trains on 'chosen')"
    notes = (note,) if "rejected" in columns else ()
    has_prompt = config.prompt_column in columns
    used = frozenset(["chosen", "rejected"]) | (frozenset([config.prompt_column]) if has_prompt else frozenset())
    if not is_conversation(first.get("chosen")):

        def read_text(row: Row, _: set[str]) -> dict[str, Any]:
            chosen = _text(row, "chosen")
            if has_prompt:
                return {"prompt": _text(row, config.prompt_column), "completion": chosen}
            start = _common(chosen, _text(row, "rejected"))
            if start == len(chosen):
                raise BadColumn("chosen", "is no longer than its common beginning with 'rejected', which is the prompt")
            return {"prompt": chosen[:start], "completion": chosen[start:]}

        return Reader("prompt_completion", read_text, used, notes)
    beside = _Surroundings(columns, config)

    def read(row: Row, notes: set[str]) -> dict[str, Any]:
        chosen = _in_column("chosen", lambda: conversation(_there(row, "chosen"), notes))
        prompt: list[Turn] = []
        if (
            has_prompt
            and isinstance(row.get(config.prompt_column), str)
            and not is_conversation(row[config.prompt_column])
        ):
            if chosen[0]["role"] == "assistant":
                prompt = [{"role": "user", "content": row[config.prompt_column]}]
        elif has_prompt:
            prompt = _in_column(config.prompt_column, lambda: conversation(_there(row, config.prompt_column), notes))
        if prompt and chosen[: len(prompt)] == prompt:
            chosen = chosen[len(prompt) :]
        if not prompt:  # it stands at the beginning of both
            rejected = _in_column("rejected", lambda: conversation(row.get("rejected") or chosen, set()))
            end = min(_common(chosen, rejected), len(chosen) - 1)
            while end and chosen[end]["role"] != "assistant":
                end -= 1
            prompt, chosen = chosen[:end], chosen[end:]
        if not prompt:
            raise BadColumn("chosen", "begins with an answer and there is no prompt to it")
        return _turns_apart("chosen", beside, row, prompt, chosen, notes)

    return Reader("prompt_completion_turns", read, used | beside.used, notes)


def _common(one: Any, other: Any) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _alpaca(columns: list[str], config: DataConfig) -> Reader:
    instruction, context, answer = (next((n for n in names if n in columns), None) for names in _ALPACA)
    beside = _Surroundings(columns, config)
    as_turns = config.chat_template is not None

    def read(row: Row, notes: set[str]) -> dict[str, Any]:
        asked, given = _text(row, str(instruction)), _text(row, context) if context and row.get(context) else ""
        output = _text(row, str(answer))
        if as_turns:
            prompt: list[Turn] = [{"role": "user", "content": f"{asked}\n\n{given}" if given else asked}]
            return _turns_apart(str(answer), beside, row, prompt, [{"role": "assistant", "content": output}], notes)
        system = beside.with_system(row, [{"role": "user"}], notes)[0].get("content")
        head = system or (_ALPACA_HEAD_INPUT if given else _ALPACA_HEAD)
        middle = f"### Instruction:\n{asked}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
        return {"prompt": f"{head}\n\n{middle}### Response:\n", "completion": output}

    texts = frozenset(filter(None, [instruction, context, answer]))
    if as_turns:
        return Reader("prompt_completion_turns", read, texts | beside.used)
    return Reader("prompt_completion", read, texts | (beside.used & {config.system_column or ""}))


# ---- texts --------------------------------------------------------------------------------------------------------


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
        return {key: _text(row, name) for key, name in named.items()} | {"label": _label(row, config.label_column)}

    return Reader("classification", read, frozenset([*texts, config.label_column]))


def _label(row: Row, column: str) -> str:
    value = _there(row, column)
    if isinstance(value, list):
        raise BadColumn(column, f"must be one class, not {quoted(value)}: several labels a row cannot be trained on")
    if value == "" or not isinstance(value, str | int | float) or value != value:
        raise BadColumn(column, f"must be a class name or a whole number, not {quoted(value)}")
    if isinstance(value, float):
        if not value.is_integer():
            raise BadColumn(column, f"must be whole, not {value}: numbers as targets (regression) cannot be trained on")
        value = int(value)
    return str(value)


def _there(row: Row, column: str) -> Any:
    if row.get(column) is None:
        raise BadColumn(column, "is missing")
    return row[column]


def _text(row: Row, column: str) -> str:
    value = _there(row, column)
    if not isinstance(value, str):
        raise BadColumn(column, f"must be text, not {type(value).__name__}")
    return _short_enough(column, value)


def _json(column: str, value: Any) -> str:
    return _short_enough(column, json.dumps(value, ensure_ascii=False, default=lambda other: _as_text(column, other)))


def _as_text(column: str, value: Any) -> str:
    """Return what has no form in JSON: dates and decimals of a table as text."""
    if isinstance(value, bytes | bytearray | memoryview):
        raise BadColumn(column, "holds bytes; only text can be trained on")
    return str(value)


def _short_enough(column: str, text: str) -> str:
    size = len(text) if text.isascii() else len(text.encode(errors="replace"))
    if size > MAX_ROW_BYTES:
        raise BadColumn(
            column, f"is {size:,} bytes long; split the row into several of at most {MAX_ROW_BYTES:,} bytes"
        )
    return text


def _in_column(column: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except Unfit as problem:
        raise BadColumn(column, str(problem)) from None
