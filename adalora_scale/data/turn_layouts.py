"""Rows that are conversations, or become some: messages, prompts with completions, preferences, instructions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adalora_scale.config import DataConfig
from adalora_scale.data.row_values import (
    BadColumn,
    Reader,
    Row,
    as_json,
    first_there,
    parsed,
    text_in,
    turns_in,
)
from adalora_scale.data.turns import Turn, document_list, is_conversation, template_variables, tool_list

ALPACA = (("instruction",), ("input", "context"), ("output", "response"))
_ALPACA_HEAD = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
)
_ALPACA_HEAD_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
)


def messages_column(columns: list[str], config: DataConfig) -> str:
    """Return the column with the turns: the one that is named, or `conversations` where there is none of that name."""
    default = DataConfig.messages_column
    others = (name for name in ("conversations", "conversation") if name in columns)
    if config.messages_column == default and default not in columns:
        return next(others, default)
    return config.messages_column


class Surroundings:
    """What stands beside a conversation in its row, in some rows perhaps: system text, tools, documents, variables."""

    def __init__(self, config: DataConfig) -> None:
        tools: tuple[str, ...] = () if config.tools_column is None else (config.tools_column,)
        if tools == (DataConfig.tools_column,):
            tools += ("functions",)  # OpenAI's older name
        documents = () if config.documents_column is None else (config.documents_column,)
        self._columns: dict[str, tuple[tuple[str, ...], Callable[[Any], Any]]] = {
            "tools": (tools, tool_list),
            "documents": (documents, document_list),
            "chat_template_kwargs": (("chat_template_kwargs",), template_variables),
        }
        self._system = config.system_column
        names = [name for group, _ in self._columns.values() for name in group]
        self.used = frozenset(names if self._system is None else [*names, self._system])

    def read(self, row: Row) -> dict[str, str | None]:
        read: dict[str, str | None] = {}
        for key, (names, parse) in self._columns.items():
            name = first_there(row, names)
            value = None if name is None else parsed(name, row[name], parse)
            read[key] = None if name is None or value is None else as_json(name, value)
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


def messages_reader(columns: list[str], config: DataConfig) -> Reader:
    """Return how to read whole conversations."""
    column, beside = messages_column(columns, config), Surroundings(config)

    def read(row: Row, notes: set[str]) -> dict[str, Any]:
        turns = turns_in(row, column, notes)
        return {"messages": as_json(column, beside.with_system(row, turns, notes)), **beside.read(row)}

    return Reader("messages", read, beside.used | {column})


def pair_of_turns_reader(config: DataConfig) -> Reader:
    """Return how to read prompts and completions that are lists of turns."""
    names, beside = (config.prompt_column, config.completion_column), Surroundings(config)

    def read(row: Row, notes: set[str]) -> dict[str, Any]:
        prompt, completion = (turns_in(row, name, notes) for name in names)
        return _turns_apart(names[1], beside, row, prompt, completion, notes)

    return Reader("prompt_completion_turns", read, beside.used | set(names))


def _turns_apart(
    column: str, beside: Surroundings, row: Row, prompt: list[Turn], completion: list[Turn], notes: set[str]
) -> dict[str, Any]:
    if not any(turn["role"] == "assistant" for turn in completion):
        raise BadColumn(column, "has no turn of the assistant's, so there is nothing to train on")
    prompt = beside.with_system(row, prompt, notes)
    turns = as_json(column, [*prompt, *completion])
    return {"messages": turns, "prompt_turns": len(prompt), **beside.read(row)}


def preference_reader(columns: list[str], first: Row, config: DataConfig) -> Reader:
    """Return how to read preferences, of which what was chosen is trained on.

    TRL's two forms: with a prompt of its own, or with the common beginning of both answers as the prompt.
    """
    note = "column 'rejected' (this is supervised training: it trains on 'chosen')"
    notes = (note,) if "rejected" in columns else ()
    has_prompt = config.prompt_column in columns
    used = frozenset(["chosen", "rejected"]) | (frozenset([config.prompt_column]) if has_prompt else frozenset())
    if not is_conversation(first.get("chosen")):

        def read_text(row: Row, _: set[str]) -> dict[str, Any]:
            chosen = text_in(row, "chosen")
            if has_prompt:
                return {"prompt": text_in(row, config.prompt_column), "completion": chosen}
            start = _common(chosen, text_in(row, "rejected"))
            if start == len(chosen):
                raise BadColumn("chosen", "is no longer than its common beginning with 'rejected', which is the prompt")
            return {"prompt": chosen[:start], "completion": chosen[start:]}

        return Reader("prompt_completion", read_text, used, notes)
    beside = Surroundings(config)

    def read(row: Row, notes: set[str]) -> dict[str, Any]:
        chosen = turns_in(row, "chosen", notes)
        prompt: list[Turn] = []
        if (
            has_prompt
            and isinstance(row.get(config.prompt_column), str)
            and not is_conversation(row[config.prompt_column])
        ):
            if chosen[0]["role"] == "assistant":
                prompt = [{"role": "user", "content": row[config.prompt_column]}]
        elif has_prompt:
            prompt = turns_in(row, config.prompt_column, notes)
        if prompt and chosen[: len(prompt)] == prompt:
            chosen = chosen[len(prompt) :]
        if not prompt:  # it stands at the beginning of both
            rejected = turns_in(row, "rejected", set()) if row.get("rejected") else chosen
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


def alpaca_reader(config: DataConfig) -> Reader:
    """Return how to read instructions with their answers."""
    beside = Surroundings(config)
    as_turns = config.chat_template is not None

    def read(row: Row, notes: set[str]) -> dict[str, Any]:
        instruction, context, answer = (first_there(row, names) or names[0] for names in ALPACA)
        asked, output = text_in(row, instruction), text_in(row, answer)
        given = text_in(row, context) if row.get(context) else ""
        if as_turns:
            prompt: list[Turn] = [{"role": "user", "content": f"{asked}\n\n{given}" if given else asked}]
            return _turns_apart(answer, beside, row, prompt, [{"role": "assistant", "content": output}], notes)
        system = beside.with_system(row, [{"role": "user"}], notes)[0].get("content")
        head = system or (_ALPACA_HEAD_INPUT if given else _ALPACA_HEAD)
        middle = f"### Instruction:\n{asked}\n\n" + (f"### Input:\n{given}\n\n" if given else "")
        return {"prompt": f"{head}\n\n{middle}### Response:\n", "completion": output}

    texts = frozenset(name for names in ALPACA for name in names)
    if as_turns:
        return Reader("prompt_completion_turns", read, texts | beside.used)
    return Reader("prompt_completion", read, texts | (beside.used & {config.system_column or ""}))
