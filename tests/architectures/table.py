"""The verdicts as a table."""

from __future__ import annotations

import platform
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.architectures.runs import CHECKS

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
_WORDS = {"right": "right", "refused": "refused", "wrong": "**wrong**"}


def line(name: str, entry: dict[str, Any]) -> str:
    """Return one architecture for the terminal."""
    if entry["built"]:
        return f"{name}: not built small: {_short(entry['built'])}"
    words = [f"{check} {word}{': ' + reason if reason else ''}" for check, (word, reason) in entry["checks"].items()]
    return f"{name} ({entry['kind']}): " + "; ".join(words)


def markdown(found: dict[str, dict[str, Any]]) -> str:
    """Return the table, the reasons below it, and what could not be built."""
    rows = [f"| architecture | as | {' | '.join(CHECKS)} |", f"|---|---|{'---|' * len(CHECKS)}"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, entry in sorted(found.items()):
        if entry["built"]:
            continue
        cells = []
        for check in CHECKS:
            word, reason = entry["checks"].get(check, ("", ""))
            cells.append(_WORDS.get(word, "–"))
            if reason:
                reasons.setdefault((word, _short(reason)), []).append(f"{name} ({check})")
        rows.append(f"| `{name}` | {entry['kind']} | {' | '.join(cells)} |")
    why = [f"- {word}: {reason} – {', '.join(names)}" for (word, reason), names in sorted(reasons.items())]
    unbuilt = [f"- `{name}`: {_short(entry['built'])}" for name, entry in sorted(found.items()) if entry["built"]]
    parts = ["\n".join(rows), counts(found)]
    parts += ["Reasons:\n\n" + "\n".join(why)] if why else []
    parts += ["Not built small here, so not tried:\n\n" + "\n".join(unbuilt)] if unbuilt else []
    return "\n\n".join(parts)


def counts(found: dict[str, dict[str, Any]]) -> str:
    """Return how many verdicts of each word there are."""
    words = [word for entry in found.values() for word, _ in entry["checks"].values()]
    tried = sum(not entry["built"] for entry in found.values())
    shown = ", ".join(f"{words.count(word)} {word}" for word in _WORDS)
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "peft", "bitsandbytes"))
    return (
        f"{tried} of {len(found)} architectures; verdicts: {shown}. {time.strftime('%Y-%m-%d')}, {packages}, "
        f"Python {platform.python_version()}."
    )


def rewrite(page: Path, found: dict[str, dict[str, Any]]) -> None:
    """Put the table between the page's two marks."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n{markdown(found)}\n\n{END}{after}", encoding="utf-8")


def _short(reason: str) -> str:
    placeless = re.sub(r"/\S*coverage_\w+/", "", reason)  # where it was tried says nothing
    return " ".join(placeless.split())[:220].replace("|", "\\|")
