"""A process that renders conversations for `rendering.Renderer` and may be ended at any time; run as a script.

A chat template is a program of a stranger. Jinja's sandbox keeps it from files and Python's insides, not from looping
for ever or from doubling a text until no memory is left, and one operation on huge values (``'a' * 10**12``,
``10**10**10``, which Jinja computes while it compiles) cannot be interrupted from inside. So it runs here, under limits
that the operating system enforces.

Standard input: one JSON line, ``{"template", "variables", "seconds", "bytes", "memory"}``, then a line a batch: a list
of requests, ``{"messages", "tools", "documents", "variables", "generation_prompt"}`` (the first is needed).
Standard output: for every request a JSON line, ``{"text", "spans"}``, ``{"refused"}`` or ``{"limit"}``; spans are the
characters between ``{% generation %}`` marks.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from typing import Any

for _name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"):  # they mean the run; it ends this process itself
    signal.signal(getattr(signal, _name), signal.SIG_IGN)

from transformers.utils.chat_template_utils import render_jinja_template  # noqa: E402


def main() -> None:
    """Render until standard input ends."""
    order = json.loads(sys.stdin.readline())
    if os.path.exists("/proc/self/statm"):  # elsewhere than on Linux RLIMIT_AS limits nothing
        with open("/proc/self/statm", encoding="ascii") as file:
            in_use = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + order["memory"],) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    for line in sys.stdin:
        for request in json.loads(line):
            # Computing time, not the clock's: a busy or suspended machine makes no template slow.
            limit = int(time.process_time()) + 1 + order["seconds"]
            resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
            sys.stdout.write(json.dumps(_render(request, order)) + "\n")
            sys.stdout.flush()


def _render(request: dict[str, Any], order: dict[str, Any]) -> dict[str, Any]:
    try:
        rendered: Any = render_jinja_template(
            [request["messages"]],
            tools=request.get("tools"),
            documents=request.get("documents"),
            chat_template=order["template"],
            return_assistant_tokens_mask=True,
            add_generation_prompt=request.get("generation_prompt", False),
            **order["variables"] | (request.get("variables") or {}),
        )
        [text], [spans] = rendered
    except MemoryError:
        return {"limit": f"it takes more than {order['memory'] // 2**20:,} MiB of memory"}
    except Exception as error:  # whatever a program does wrong
        said = str(error)[:300] or "no message"
        return {"refused": said if type(error).__module__.startswith("jinja2") else f"{type(error).__name__}: {said}"}
    if len(text) > order["bytes"]:
        return {"limit": f"it makes {len(text):,} characters of the row; {order['bytes']:,} are allowed"}
    return {"text": text, "spans": spans}


if __name__ == "__main__":
    main()
