"""Rows of published data sets of function calls that are not lists of turns: xLAM's columns, Glaive's one text.

Both become conversations whose functions are the template's `tools`. What does not have the published form is refused:
a turn or a call that is guessed wrong would be trained on.
"""

from __future__ import annotations

import json
import re
from typing import Any

from adalora_scale.config import DataConfig
from adalora_scale.data.row_limits import parse_row
from adalora_scale.data.row_values import BadColumn, Reader, Row, as_json, parsed, required, text_in
from adalora_scale.data.turn_layouts import Surroundings
from adalora_scale.data.turns import Turn, Unfit, conversation, from_json, tool_list
from adalora_scale.errors import UserError
from adalora_scale.messages import quoted

XLAM = ("query", "answers")
"""Columns of Salesforce's xLAM function-calling data, beside `tools`."""
GLAIVE = "chat"
"""Column of Glaive's function-calling data (v2), beside `system`."""

_ROLES = {"USER": "user", "ASSISTANT": "assistant", "FUNCTION RESPONSE": "tool"}
_TURN = re.compile(rf"(?:\A|\n[ \t]*\n)\s*({'|'.join(_ROLES)}):")
_LINE = re.compile(rf"^[ \t]*({'|'.join(_ROLES)}):", re.MULTILINE)
_CALL, _END = "<functioncall>", "<|endoftext|>"
_QUOTED_CALL = re.compile(r"""\{\s*"name":\s*("(?:[^"\\]|\\.)*"),\s*"arguments":\s*'(.*)'\s*\}""", re.DOTALL)


def xlam_reader(config: DataConfig) -> Reader:
    """Return how to read `query`, `tools` and `answers`, the calls; the last two are JSON, or its text."""
    beside = Surroundings(config)

    def read(row: Row, notes: set[str]) -> dict[str, Any]:
        query, calls = text_in(row, XLAM[0]), from_json(required(row, XLAM[1]))
        if not isinstance(calls, list) or not calls or not all(isinstance(from_json(call), dict) for call in calls):
            raise BadColumn(XLAM[1], f"must be a list of calls, {{name, arguments}}, not {quoted(calls)}")
        turns = [{"role": "user", "content": query}, {"role": "assistant", "tool_calls": calls}]
        turns = parsed(XLAM[1], turns, lambda value: conversation(value, notes))
        return {"messages": as_json(XLAM[1], beside.with_system(row, turns, notes)), **beside.read(row)}

    return Reader("messages", read, beside.used | set(XLAM))


def glaive_reader(config: DataConfig) -> Reader:
    """Return how to read a conversation in one text, `chat`, whose functions stand in the text of `system`.

    ``SYSTEM: … -`` and JSON objects; ``USER: …``, ``ASSISTANT: … <functioncall> {"name": …, "arguments": '…'}
    <|endoftext|>``, ``FUNCTION RESPONSE: …``, an empty line between them.
    """
    beside = Surroundings(config)
    system = config.system_column

    def read(row: Row, notes: set[str]) -> dict[str, Any]:
        turns = parsed(GLAIVE, text_in(row, GLAIVE), lambda text: conversation(_turns(text), notes))
        others = beside.read(row)
        if system is not None and row.get(system):
            said, tools = parsed(system, text_in(row, system), _system)
            if tools and others.get("tools"):
                raise BadColumn(system, f"holds functions, and so does '{config.tools_column}'; keep one of them")
            others |= {"tools": as_json(system, tools)} if tools else {}
            turns = beside.with_system({system: said}, turns, notes)
        return {"messages": as_json(GLAIVE, turns), **others}

    return Reader("messages", read, beside.used | {GLAIVE})


def _turns(text: str) -> list[Turn]:
    parts = _TURN.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise Unfit(f"must begin with one of {', '.join(f'{name}:' for name in _ROLES)}, not {quoted(text)}")
    turns = []
    for number, (name, said) in enumerate(zip(parts[1::2], parts[2::2], strict=True), start=1):
        try:
            turns.append(_turn(_ROLES[name], said.strip()))
        except Unfit as problem:
            raise Unfit(f"turn {number} {problem}") from None
    return turns


def _turn(role: str, said: str) -> Turn:
    if inside := _LINE.search(said):
        raise Unfit(f"has a line that begins with {inside[1]}: and no empty line before it, as turns have")
    said = said.removesuffix(_END).rstrip() if role == "assistant" else said
    if _END in said:
        raise Unfit(f"has {_END} inside it, which ends a turn")
    if role != "assistant":
        return {"role": role, "content": said}
    before, mark, call = said.partition(_CALL)
    if not mark:
        return {"role": role, "content": said}
    return {"role": role, "content": before.strip() or None, "tool_calls": [_call(call.strip())]}


def _call(text: str) -> dict[str, Any]:
    """Return one call, whose arguments are JSON inside single quotes, in which a quote may be written \\'."""
    tried = [text]
    if match := _QUOTED_CALL.fullmatch(text):
        whole = [match[2], match[2].replace("\\'", "'")]
        tried += [f'{{"name": {match[1]}, "arguments": {arguments or "{}"}}}' for arguments in whole]
    for form in tried:
        try:
            call = parse_row("", form)
        except (json.JSONDecodeError, UserError):
            continue
        if isinstance(call, dict) and isinstance(call.get("name"), str) and set(call) <= {"name", "arguments"}:
            return call
    raise Unfit(f'has a call that is not {{"name": …, "arguments": \'{{…}}\'}}: {quoted(text)}')


def _system(text: str) -> tuple[str, list[dict[str, Any]] | None]:
    """Return what a system text says, and the functions behind it."""
    text = text.strip().removeprefix("SYSTEM:").strip()
    start = re.search(r"^\s*\{", text, re.MULTILINE)
    if start is None:
        return text, None
    said, rest = text[: start.start()].strip(), text[start.start() :].strip()
    tools, decoder = [], json.JSONDecoder()
    while rest:
        try:
            _, end = decoder.raw_decode(rest)
            tools.append(parse_row("", rest[:end]))
        except (json.JSONDecodeError, UserError, RecursionError):
            raise Unfit(f"has functions that are not JSON objects, from {quoted(rest)} on") from None
        rest = rest[end:].lstrip().removeprefix(",").lstrip()
    return said, tool_list(tools)
