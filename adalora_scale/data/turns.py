"""One conversation as people write it, brought into the form that chat templates take: {role, content, …}.

OpenAI's fine-tuning rows, ShareGPT's `from` and `value`, TRL's and the hub's tool data sets differ in names, in how
a tool call's arguments stand there (an object, or its JSON text) and in what is left out or null. Every key that is not
understood here stays in its turn, for the template to use.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from adalora_scale.data.row_limits import parse_row
from adalora_scale.errors import UserError
from adalora_scale.messages import quoted

Turn = dict[str, Any]

REASONING = ("reasoning_content", "reasoning", "thinking", "thinking_content")
"""Keys of a turn's reasoning, as transformers hands them on to templates (it copies the one that is there)."""

_SHAREGPT = {  # `from` of ShareGPT and its descendants -> role
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("tool", "function", "observation", "function_response", "function-response", "ipython"), "tool"),
    **dict.fromkeys(("function_call", "function-call", "tool_call"), "call"),
}
_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "function": "tool", "observation": "tool"}
_PLAIN_ROLES = {"user", "assistant", "system", "developer", "tool"}
_TEXT_PARTS = {"text", "input_text", "output_text"}


class Unfit(Exception):
    """What is wrong with a value; whoever knows the file, line and column says where."""


def conversation(value: Any, notes: set[str]) -> list[Turn]:
    """Return the turns of one conversation.

    Args:
        value: a list of turns, or JSON text of one.
        notes: gets what was left unused, in words.

    Raises:
        Unfit: it is no conversation.
    """
    value = _turned(from_json(value))
    if not isinstance(value, list) or not value:
        raise Unfit(f"must be a non-empty list of {{role, content}}, not {quoted(value)}")
    turns = []
    for number, turn in enumerate(value, start=1):
        try:
            turns.append(_turn(from_json(turn), notes))
        except Unfit as problem:
            raise Unfit(f"turn {number} {problem}") from None
    return turns


def is_conversation(value: Any) -> bool:
    """Whether a value looks like a list of turns rather than a text."""
    value = from_json(value) if isinstance(value, str) and value.lstrip().startswith("[{") else value
    return isinstance(value, list)


def from_json(value: Any) -> Any:
    """Return what JSON text of a list or an object holds; anything else as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return parse_row("", value)
    except (json.JSONDecodeError, UserError):
        return value


def text_of(turn: Turn) -> str:
    """Return a turn's text, its parts joined."""
    content = turn.get("content", "")
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def is_trained(turn: Turn) -> bool:
    """Whether a turn is the assistant's and not excluded by ``weight: 0``."""
    return turn["role"] == "assistant" and turn.get("weight") != 0


def tool_list(value: Any) -> list[dict[str, Any]] | None:
    """Return tools in OpenAI's schema, from objects or JSON text, with or without ``{"type": "function"}`` around them.

    Raises:
        Unfit: it is no list of tools.
    """
    value = from_json(value)
    if value is None or value in ("", [], {}):
        return None
    tools = []
    for number, entry in enumerate(value if isinstance(value, list) else [value], start=1):
        tool = from_json(entry)
        if not isinstance(tool, Mapping):
            raise Unfit(f"must be a list of tools (JSON objects), not {quoted(entry)} as tool {number}")
        function = tool.get("function")
        if not isinstance(function, Mapping):
            if "type" in tool and "name" not in tool:
                tools.append(dict(tool))  # a tool of another kind, which some templates know
                continue
            function = {key: inner for key, inner in tool.items() if key != "type"}
        if not isinstance(function.get("name"), str):
            raise Unfit(f"tool {number} must have a name, as {{type: function, function: {{name, …}}}} has")
        function = {key: from_json(inner) if key == "parameters" else inner for key, inner in function.items()}
        tools.append({"type": "function", **{k: v for k, v in tool.items() if k == "type"}, "function": function})
    return tools


def document_list(value: Any) -> list[dict[str, Any]] | None:
    """Return documents for a template that answers from them.

    Raises:
        Unfit: it is no list of objects.
    """
    value = from_json(value)
    if value is None or value in ("", []):
        return None
    entries = [from_json(entry) for entry in value] if isinstance(value, list) else []
    documents = [entry for entry in entries if isinstance(entry, dict)]
    if not documents or len(documents) < len(entries):
        raise Unfit(f"must be a list of objects with title and text, not {quoted(value)}")
    return documents


def template_variables(value: Any) -> dict[str, Any] | None:
    """Return a row's own variables for the template (TRL's column `chat_template_kwargs`).

    Raises:
        Unfit: it is no object, or names what the template gets anyway.
    """
    value = from_json(value)
    if value is None or value in ("", {}):
        return None
    taken = {"messages", "conversations", "tools", "documents", "chat_template", "add_generation_prompt"}
    taken |= {"return_assistant_tokens_mask", "continue_final_message"}
    if not isinstance(value, dict) or taken & value.keys():
        raise Unfit(f"must be an object with variables of the chat template's own, not {quoted(value)}")
    return value


def _turned(value: Any) -> Any:
    """Return a list of objects for an object of lists, as which older versions of `datasets` stored it."""
    if isinstance(value, dict) and {"role", "from"} & value.keys():
        columns = {key: column for key, column in value.items() if isinstance(column, list)}
        if len(columns) == len(value) and len({len(column) for column in columns.values()}) == 1:
            return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]
    return value


def _turn(turn: Any, notes: set[str]) -> Turn:
    if not isinstance(turn, Mapping):
        raise Unfit(f"must be {{role, content}} with text in both, not {quoted(turn)}")
    found = {key: value for key, value in turn.items() if value is not None}
    role = _role(found, turn)
    content = found.pop("content", None) if "content" in found else found.pop("value", None)
    if role == "call":
        role, found["tool_calls"], content = "assistant", content, None
    if (legacy := found.pop("function_call", None)) is not None:
        found["tool_calls"] = [*found.get("tool_calls", []), legacy]
    calls = _calls(found.pop("tool_calls", None))
    done: Turn = {"role": role}
    if content is not None:
        done |= _content(content, role, turn)
    elif not calls and not any(found.get(key) for key in REASONING):
        raise Unfit(f"must be {{role, content}} with text in both, not {quoted(turn)}")
    if calls:
        done["tool_calls"] = calls
    weight = _weight(found)
    if weight is not None and role == "assistant":
        done["weight"] = weight
    elif weight == 1:
        notes.add("weight or train on turns that are not the assistant's: only assistant turns are trained on")
    return done | {key: value for key, value in found.items() if key not in done}


def _role(found: Turn, turn: Any) -> str:
    named = "role" in found
    role = found.pop("role", None) if named else found.pop("from", None)
    if not isinstance(role, str) or not role:
        raise Unfit(f"must be {{role, content}} with text in both, not {quoted(turn)}")
    lower = role.strip().lower()
    if named:
        return lower if lower in _PLAIN_ROLES else _ROLES.get(lower, role)
    if lower not in _SHAREGPT:
        raise Unfit(f"is from {quoted(role)}; known are {', '.join(_SHAREGPT)}; call it by one of these")
    return _SHAREGPT[lower]


def _content(content: Any, role: str, turn: Any) -> Turn:
    """Return `content` as text or as text parts, and `reasoning_content` where a part holds it."""
    if isinstance(content, str):
        return {"content": content}
    if isinstance(content, list) and all(
        isinstance(p, str) or (isinstance(p, Mapping) and "type" in p) for p in content
    ):
        parts, thoughts = [], []
        for part in content:
            kind, text = ("text", part) if isinstance(part, str) else (part["type"], part.get("text"))
            if kind in ("thinking", "reasoning") and isinstance(part.get(kind, text), str):
                thoughts.append(part.get(kind, text))
            elif kind == "refusal" and isinstance(part.get("refusal"), str):
                parts.append({"type": "text", "text": part["refusal"]})
            elif kind in _TEXT_PARTS and isinstance(text, str):
                parts.append({"type": "text", "text": text})
            else:
                raise Unfit(
                    f"holds a part of type {quoted(kind)}; only text can be trained on: remove the row or the part"
                )
        return {"content": parts or ""} | ({"reasoning_content": "\n".join(thoughts)} if thoughts else {})
    if role == "tool":  # a result as it came, which templates expect as its JSON text
        return {"content": json.dumps(content, ensure_ascii=False)}
    raise Unfit(f"must be {{role, content}} with text in both, not {quoted(turn)}")


def _calls(value: Any) -> list[dict[str, Any]]:
    value = from_json(value)
    if value is None or value in ("", [], {}):
        return []
    calls = []
    for entry in value if isinstance(value, list) else [value]:
        call = from_json(entry)
        if isinstance(call, Mapping) and not isinstance(call.get("function"), Mapping):
            function = {key: call[key] for key in ("name", "arguments", "parameters") if key in call}
            call = {"type": "function", "function": function} | {k: v for k, v in call.items() if k not in function}
        if not isinstance(call, Mapping) or not isinstance(call["function"].get("name"), str):
            raise Unfit(f"must have tool_calls like {{function: {{name, arguments}}}}, not {quoted(entry)}")
        function = dict(call["function"])
        if "arguments" not in function:
            function["arguments"] = function.pop("parameters", {})
        arguments = function["arguments"]
        function["arguments"] = {} if arguments is None or arguments == "" else from_json(arguments)
        calls.append({**call, "function": function})
    return calls


def _weight(found: Turn) -> int | None:
    """Take `weight` (OpenAI) and `train` or `training` (axolotl) out of a turn; 0 or 1, None if there is neither."""
    given = {key: found.pop(key) for key in ("weight", "train", "training") if key in found}
    for key, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            raise Unfit(f"has {key} {quoted(value)}; it must be 0 (not trained on) or 1")
    if len({int(value) for value in given.values()}) > 1:
        raise Unfit(f"has {' and '.join(given)}, which contradict each other; keep one of them")
    return next((int(value) for value in given.values()), None)
