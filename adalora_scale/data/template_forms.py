"""How a template wants to be given what a row holds, found out by rendering short conversations with it.

Templates agree on {role, content} and on little else: some go over a turn's parts where others take its text, some
write a call's arguments as JSON where others expect them written, some fail where a turn has no content. A row is then
given in the form that the template shows; what no form shows, `template_use` finds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any, Literal

from adalora_scale.data.rendering import LimitReached, Rendering
from adalora_scale.data.turns import Turn, text_of
from adalora_scale.errors import UserError

_ASK, _SAY, _DONE = "fernwehask", "quagmiresay", "zephyrdone"
_ABSENT: tuple[Literal["missing", "empty", "null"], ...] = ("missing", "empty", "null")
_CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "probetool", "arguments": {"probekey": "probevalue"}},
}


@dataclass(frozen=True)
class TemplateForm:
    """What one template takes."""

    template: str
    parts_taken: bool = False
    """A turn's content may be a list of parts."""
    text_taken: bool = True
    """A turn's content may be text."""
    arguments_written: bool = False
    """A call's arguments must be JSON text, not an object."""
    absent: Literal["missing", "empty", "null"] = "missing"
    """What stands for the content of a turn that has none; transformers leaves the key out."""

    def fit(self, turns: list[Turn]) -> list[Turn]:
        """Return turns as this template takes them."""
        return [self._fit(turn) for turn in turns]

    def _fit(self, turn: Turn) -> Turn:
        fitted = dict(turn)
        if turn["role"] == "developer" and "developer" not in self.template:
            fitted["role"] = "system"  # what OpenAI called it before
        content = turn.get("content")
        if isinstance(content, list) and not self.parts_taken:
            fitted["content"] = text_of(turn)
        elif isinstance(content, str) and not self.text_taken and self.parts_taken:
            fitted["content"] = [{"type": "text", "text": content}]
        elif content is None and self.absent != "missing":
            fitted["content"] = None if self.absent == "null" else "" if self.text_taken else []
        if self.arguments_written and "tool_calls" in turn:
            fitted["tool_calls"] = [_written(call) for call in turn["tool_calls"]]
        return fitted


def find_form(template: str, rendering: Rendering, *, calls: bool) -> TemplateForm:
    """Return the form of rows that a template shows.

    Args:
        template: its text.
        rendering: renders with it.
        calls: some row has tool calls.
    """
    text = _shows(rendering, _plain(lambda said: said))
    parts = _shows(rendering, _plain(lambda said: [{"type": "text", "text": said}]), hides="'type'")
    form = TemplateForm(template, parts, text or not parts)
    return _with_calls(form, rendering) if calls else form


def _with_calls(form: TemplateForm, rendering: Rendering) -> TemplateForm:
    tools = [{"type": "function", "function": {"name": "probetool", "description": "", "parameters": {}}}]
    turns: list[Turn] = [
        {"role": "user", "content": _ASK},
        {"role": "assistant", "tool_calls": [_CALL]},
        {"role": "tool", "tool_call_id": _CALL["id"], "name": "probetool", "content": _SAY},
        {"role": "assistant", "content": _DONE},
    ]
    for written in (False, True):
        for absent in _ABSENT:
            tried = replace(form, arguments_written=written, absent=absent)
            shown = _rendered(rendering, {"messages": tried.fit(turns), "tools": tools})
            if shown is not None and "probekey" in shown and "probevalue" in shown and not _garbled(shown):
                return tried
    return replace(form, absent="empty")  # no form shows a call, so that what is rendered is refused with the reason


def _garbled(shown: str) -> bool:
    """Whether arguments are JSON inside JSON (a quote behind a backslash), or Python's form of an object."""
    return '\\"probekey' in shown or "{'probekey'" in shown


def _plain(content: Any) -> list[Turn]:
    return [{"role": "user", "content": content(_ASK)}, {"role": "assistant", "content": content(_SAY)}]


def _shows(rendering: Rendering, turns: list[Turn], hides: str | None = None) -> bool:
    text = _rendered(rendering, {"messages": turns})
    return text is not None and _ASK in text and _SAY in text and (hides is None or hides not in text)


def _rendered(rendering: Rendering, request: dict[str, Any]) -> str | None:
    try:
        return rendering.render([request], ["a short conversation"])[0][0]
    except LimitReached:
        raise
    except UserError:
        return None


def _written(call: dict[str, Any]) -> dict[str, Any]:
    function = call["function"]
    arguments = function["arguments"]
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": arguments}}
