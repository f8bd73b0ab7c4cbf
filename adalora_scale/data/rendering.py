"""Conversations rendered by a template that nobody here has read, under limits of time, memory and size.

[Note: what bounds a chat template]
Templates come with models and data of strangers. They run in `template_child.py`, a process of its own: no signal,
timer or thread of this process is touched, so it works in a rank's main thread and in the workers of `datasets.map`
alike, and what cannot be interrupted from inside (one multiplication that takes the whole memory) ends with that
process. *Every* row is rendered there, not a sample: a template may wait for the row that it was made for. The
operating system counts computing time and memory; this side counts what comes back.

The cost: a second once a process, and about 0.2 ms for the way there and back of a conversation of 3 kB, which takes
1.7 ms to render and tokenise. Templates that ship with this
package or with TRL (`is_known`) are rendered in the process itself and pay nothing.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Protocol, cast

import trl.chat_template_utils
from transformers.utils.chat_template_utils import render_jinja_template
from trl.chat_template_utils import has_generation_markers

from adalora_scale.data.row_limits import MAX_ROW_BYTES
from adalora_scale.errors import UserError

RENDERING_SECONDS = 2
"""Computing time a row; ordinary ones take less than a thousandth."""
RENDERING_MEMORY = 2**30
"""Bytes that rendering may take."""
_NO_PROGRESS_S = 120  # of the clock: a template cannot sleep, so this is a machine that does not run the process

_CHILD = Path(__file__).with_name("template_child.py")
_TEMPLATES = Path(__file__).with_name("chat_templates")

Span = tuple[int, int]
Request = dict[str, Any]
"""What is rendered: `messages`; `tools`, `documents` and `variables` (of the template's own) where there are some; and
`generation_prompt`, whether an answer's beginning follows."""


@cache
def known_templates() -> frozenset[str]:
    """Return the templates of this package and those that TRL ships: read by people, and linear in the row."""
    ours = [path.read_text(encoding="utf-8") for path in _TEMPLATES.glob("*.jinja")]
    theirs = [v for name, v in vars(trl.chat_template_utils).items() if name.endswith("_template") and type(v) is str]
    return frozenset([*ours, *theirs])


def is_known(template: str) -> bool:
    """Whether a template needs no limits."""
    return template in known_templates()


class LimitReached(UserError):
    """A template took more time, memory or room than any ordinary one."""


class Rendering(Protocol):
    """Whatever renders conversations with one template."""

    def render(self, requests: list[Request], names: list[str]) -> list[tuple[str, list[Span]]]:
        """Return text and the spans of assistant turns (characters) of each; see `Renderer.render`."""


class DirectRenderer:
    """Renders with a template that `is_known`, in this process.

    Args:
        template: the Jinja text.
        variables: what the template sees beside the messages: the tokenizer's special tokens.
    """

    def __init__(self, template: str, variables: dict[str, str]) -> None:
        self._template, self._variables, self._marked = template, variables, has_generation_markers(template)

    def render(self, requests: list[Request], names: list[str]) -> list[tuple[str, list[Span]]]:
        """Return text and the spans of assistant turns (characters) of each conversation.

        Raises:
            UserError: the template refuses a conversation or fails on it.
        """
        return [self._one(request, name) for request, name in zip(requests, names, strict=True)]

    def _one(self, request: Request, name: str) -> tuple[str, list[Span]]:
        try:
            rendered: Any = render_jinja_template(
                [request["messages"]],
                tools=request.get("tools"),
                documents=request.get("documents"),
                chat_template=self._template,
                return_assistant_tokens_mask=self._marked,
                add_generation_prompt=request.get("generation_prompt", False),
                **self._variables | (request.get("variables") or {}),
            )
        except Exception as error:  # whatever a program does wrong
            said = str(error)[:300] or "no message"
            raise UserError(
                f"the chat template refuses {name}: "
                + (said if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: {said}")
            ) from None
        texts, spans = rendered
        return texts[0], [(start, end) for start, end in spans[0]] if spans else []


class Renderer:
    """Renders conversations with one template in a child process, which starts when it is first needed.

    It can be pickled: a copy in a worker process starts a child of its own. Use it as a context manager, or `close` it.

    Args:
        template: the Jinja text.
        variables: what the template sees beside the messages: the tokenizer's special tokens.
    """

    def __init__(self, template: str, variables: dict[str, str]) -> None:
        self._order = {
            "template": template,
            "variables": variables,
            "seconds": RENDERING_SECONDS,
            "bytes": MAX_ROW_BYTES,
            "memory": RENDERING_MEMORY,
        }
        self._child: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def render(self, requests: list[Request], names: list[str]) -> list[tuple[str, list[Span]]]:
        """Return text and the spans of assistant turns (characters) of each conversation.

        Args:
            requests: what is rendered.
            names: what messages call each of them, for example "row 3".

        Raises:
            UserError: the template refuses a conversation or fails on it.
            LimitReached: it goes beyond a limit.
        """
        child = self._started()
        replies = self._replies(child, requests)
        found = []
        for name in names:
            reply = next(replies, None)
            if reply is None:
                raise LimitReached(f"the chat template cannot be used: on {name} {self._how_it_ended(child)}.")
            if "limit" in reply:
                raise LimitReached(f"the chat template cannot be used: on {name} {reply['limit']}.")
            if "refused" in reply:
                raise UserError(f"the chat template refuses {name}: {reply['refused']}")
            found.append((reply["text"], [(start, end) for start, end in reply["spans"]]))
        return found

    def close(self) -> None:
        """End the child process."""
        if self._child is not None and self._owner == os.getpid():
            self._child.kill()
            self._child.communicate()
        self._child = None

    def __enter__(self) -> Renderer:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"_order": self._order, "_child": None, "_owner": 0}

    def _started(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._owner != os.getpid():
            paths = os.pathsep.join(path for path in sys.path if path)
            environment = os.environ | {"PYTHONPATH": paths, "TRANSFORMERS_VERBOSITY": "error", "PYTHONUTF8": "1"}
            # -P: the script's folder must not lend its files' names to others' imports.
            command = [sys.executable, "-P", "-W", "ignore", str(_CHILD)]
            pipe = subprocess.PIPE
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=environment)
            self._owner = os.getpid()
            self._send(self._child, self._order)
        return self._child

    def _send(self, child: subprocess.Popen[bytes], tree: Any) -> None:
        pipe = cast(IO[bytes], child.stdin)
        try:
            pipe.write(json.dumps(tree, default=lambda value: f"<{type(value).__name__}>").encode() + b"\n")
            pipe.flush()
        except BrokenPipeError:  # it has ended; whoever reads its replies says how
            pass

    def _replies(self, child: subprocess.Popen[bytes], requests: list[Request]) -> Iterator[dict[str, Any]]:
        """Yield the replies to a batch, which the child reads whole before it answers; end where the child does."""
        self._send(child, requests)
        descriptor, waiting = cast(IO[bytes], child.stdout).fileno(), bytearray()
        for _ in requests:
            searched = 0
            while (end := waiting.find(b"\n", searched)) < 0:
                searched = len(waiting)
                if not select.select([descriptor], [], [], _NO_PROGRESS_S)[0]:
                    child.kill()
                    return
                if not (read := os.read(descriptor, 2**20)):
                    return
                waiting += read
                if len(waiting) > 16 * MAX_ROW_BYTES:  # no reply is so long: a character takes 6 bytes at most
                    child.kill()
                    return
            yield json.loads(bytes(waiting[:end]))
            del waiting[: end + 1]

    def _how_it_ended(self, child: subprocess.Popen[bytes]) -> str:
        _, said = child.communicate()
        self._child = None
        match -child.returncode:
            case signal.SIGXCPU:
                return f"it computes for more than {RENDERING_SECONDS} s"
            case number if number > 0:
                return f"it ends the process that renders it ({signal.Signals(number).name})"
        reason = said.decode(errors="replace").strip().splitlines() or ["no message"]
        raise RuntimeError(f"{_CHILD.name} ended with exit code {child.returncode}: {reason[-1]}")
