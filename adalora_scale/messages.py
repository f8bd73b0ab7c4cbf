"""What is printed: names and values from files of strangers, made harmless where they leave the program.

A file's name, a key, a tensor's name or a row may hold escape sequences that repaint a terminal, line breaks that forge
a second message, or marks that turn the order of letters round. They are escaped at the exits, `say`, `say_json` and
`errors.run_reporting_errors`, so that nobody who words a message has to think of it.
"""

from __future__ import annotations

import json
import sys
import unicodedata
from typing import Any, TextIO

_JOINERS = "\u200c\u200d"  # invisible, and needed to spell Persian, Hindi or some emoji

LONGEST_LINE = 2000
"""Characters of an error's line; a message may quote what a stranger wrote."""


def printable(text: str, keep: str = "") -> str:
    r"""Return `text` with every character that is no letter, mark, number, sign or space written as an escape.

    Control characters, line breaks, bidirectional overrides, lone surrogates and unassigned characters become ``\x1b``,
    ``\u202e`` and so on; letters of all scripts (é, 漢字) stay as they are.

    Args:
        text: what is to be shown.
        keep: characters that may stay, such as the line breaks of a table.
    """
    if text.isprintable():
        return text
    return "".join(c if _is_harmless(c) or c in keep else _escape(c) for c in text)


def say(*lines: object, to: TextIO | None = None) -> None:
    """Print at once, a line each; every control character is escaped, line breaks inside a line too.

    Args:
        lines: what is printed.
        to: standard output if None.
    """
    print(*(printable(str(line)) for line in lines), sep="\n", file=to or sys.stdout, flush=True)


def say_text(text: str) -> None:
    """Print a table or another text of several lines, whose writer made the names in it `printable`."""
    print(printable(text, keep="\n"), flush=True)


def say_json(tree: Any) -> None:
    """Print one JSON object on a line, in ASCII."""
    print(json.dumps(tree).replace("\x7f", "\\u007f"), flush=True)  # the one control character that json leaves


def one_line(text: str) -> str:
    """Return a message as one printable line of at most `LONGEST_LINE` characters."""
    line = printable(" ".join(text.split()))
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE - 100]} … ({len(line):,} characters) … {line[-60:]}"


def cause(error: BaseException, longest: int | None = 200) -> str:
    """Return what another library's error says, as a message of one line quotes it: cut at `longest` characters."""
    return " ".join(str(error).split())[:longest]


def quoted(value: object, longest: int = 60) -> str:
    """Return a value as a message quotes it: its `repr`, cut at `longest` characters, whatever the value is."""
    if isinstance(value, str | bytes):
        value = value[: longest + 1]
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # whole numbers of more than 4,300 digits have no decimal form
        return f"a huge {type(value).__name__}"
    return text if len(text) <= longest else text[: longest - 3] + "..."


def _is_harmless(character: str) -> bool:
    return character.isprintable() or character in _JOINERS or unicodedata.category(character) == "Zs"


def _escape(character: str) -> str:
    code = ord(character)
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
