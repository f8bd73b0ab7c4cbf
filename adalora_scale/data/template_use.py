"""Whether a rendered conversation holds what its row says: a template may leave out what it was not written for.

White space is not compared, since templates strip and indent. What training needs and the text lacks is refused;
reasoning is the template's to leave out (models are not shown what they thought before) and is named.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from adalora_scale.data.rendering import Request, Span
from adalora_scale.data.turns import REASONING, Turn, is_trained, text_of

_UNDERSTOOD = {"role", "content", "weight", "tool_calls", *REASONING}
_OTHER = "use another data.chat_template (chatml shows tools and calls)"


def problem_of(request: Request, template: str, text: str, spans: list[Span] | None, first: int) -> str | None:
    """Say what a rendering lacks that must be there, or None.

    Args:
        request: what was rendered.
        template: the template's text.
        text: the rendering.
        spans: what of it is trained on; None: all of it from the turn `first` on.
        first: turns before it are not trained on.
    """
    shown = _Shown(text)
    trained = shown if spans is None else _Shown("\n".join(text[start:end] for start, end in spans))
    for number, turn in enumerate(request["messages"], start=1):
        if not is_trained(turn) or number <= first:
            continue
        content = _visible(turn)
        if content not in shown and _answer(content) not in shown:
            return f"the chat template leaves out the text of turn {number}, which is trained on; {_OTHER}"
        for call in turn.get("tool_calls", ()):
            name = call["function"]["name"]
            if not all(leaf in shown for leaf in _call_leaves(call)):
                return f"the chat template leaves out the call of '{name}' in turn {number}, or a part of it; {_OTHER}"
            marked = content and (content in trained or _answer(content) in trained)
            if not all(leaf in trained for leaf in _call_leaves(call)) and (marked or not content):
                return (
                    f"the chat template does not mark the call of '{name}' in turn {number}, so nobody learns it: "
                    f"put it between {{% generation %}} and {{% endgeneration %}}, or {_OTHER}"
                )
    for tool in request.get("tools") or ():
        name = tool.get("function", tool).get("name", "")
        if "tools" not in template or name not in shown:
            return f"the chat template does not show the tool '{name}'; {_OTHER}, or set data.tools_column=null"
    for document in request.get("documents") or ():
        if "documents" not in template or not any(leaf in shown for leaf in _leaves(document)):
            return "the chat template does not show the documents; use one that does, or set data.documents_column=null"
    return None


def notes_of(request: Request, template: str, text: str, spans: list[Span] | None) -> list[str]:
    """Return in words what the template leaves out by its own decision, or does not look at."""
    shown, notes = _Shown(text), []
    trained = shown if spans is None else _Shown("\n".join(text[start:end] for start, end in spans))
    for turn in request["messages"]:
        content = _visible(turn)
        if any(isinstance(turn.get(key), str) and turn[key] not in shown for key in REASONING) or (
            content not in shown and _answer(content) in shown
        ):
            notes.append("the chat template leaves out reasoning of assistant turns")
        elif content not in shown and not is_trained(turn):
            notes.append(f"the chat template leaves out text of {turn['role']} turns")
        elif is_trained(turn) and content and content not in trained and _answer(content) not in trained:
            notes.append("the chat template does not mark every assistant turn as trained on")
        notes += [
            f"the chat template does not use a turn's '{key}'"
            for key in turn
            if key not in _UNDERSTOOD and key not in template
        ]
    if "developer" not in template and any(turn["role"] == "developer" for turn in request["messages"]):
        notes.append("turns of the role developer are rendered as system turns")
    return list(dict.fromkeys(notes))


class _Shown:
    """A text that is searched without regard to white space, or for a text's form inside JSON."""

    def __init__(self, text: str) -> None:
        self._text, self._tight = text, ""

    def __contains__(self, part: object) -> bool:
        if not isinstance(part, str) or part in self._text:
            return True
        self._tight = self._tight or "".join(self._text.split())
        tight = "".join(part.split())
        if tight in self._tight:
            return True
        inside = (json.dumps(part, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True))
        return any("".join(form.split()) in self._tight for form in inside)


def _visible(turn: Turn) -> str:
    return text_of(turn).strip() if turn.get("content") else ""


def _answer(content: str) -> str:
    """Return what follows the reasoning in a text."""
    return content.rpartition("</think>")[2].strip()


def _call_leaves(call: dict[str, Any]) -> Iterator[str]:
    yield call["function"]["name"]
    yield from _leaves(call["function"]["arguments"])


def _leaves(value: Any) -> Iterator[str]:
    """Yield the keys and values of a JSON value, as JSON writes them but for the quotes of texts."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _leaves(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)
