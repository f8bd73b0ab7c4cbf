"""PEFT's patterns of module names, matched in bounded time.

A key of `rank_pattern` is a regular expression to PEFT: `re.match(rf"(.*\\.)?({key})$", module)`. Python's `re` tries
alternatives one after the other, so `(a+)+` on forty letters takes days; it cannot be stopped from outside, since it
holds the interpreter. So patterns are run here as automata that follow all alternatives at once: time grows with
(characters × positions of the pattern), for every pattern. What an automaton cannot do (looking ahead, repeating what a
group matched) is refused by name, and nothing that it can do is decided otherwise than by `re`.

Keys that are names (letters, digits, `_`, `-` and dots, with a `^` before them or not) are looked up, not matched: a
model has as many of them as modules. There a dot stands for itself, which `re` would take for any letter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from adalora_scale.errors import UserError
from adalora_scale.reading.json_text import shown

_NAME = re.compile(r"\^?[\w\-]+(\.[\w\-]+)*", re.ASCII)
_MAX_LENGTH = 10_000
"""Characters of a pattern: exports of models where one name ends another are long."""
_MAX_STATES = 20_000
_MAX_STEPS = 10_000_000
"""Positions that all patterns of a file may visit together: some seconds."""
_MAX_GROUPS = 50
"""Groups inside one another."""
_QUANTIFIER = re.compile(r"\{(?!\})(?P<least>\d*)(?P<comma>,?)(?P<most>\d*)\}", re.ASCII)
_SHORT: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}


class Patterns:
    """One `rank_pattern` or `alpha_pattern`.

    Args:
        pattern: key → value, in the file's order: the first key that matches decides.
        where: file and key, for messages.

    Raises:
        UserError: a key is no regular expression, or one that cannot be matched in bounded time.
    """

    def __init__(self, pattern: Mapping[str, Any], where: str) -> None:
        self._where = where
        self._values = list(pattern.values())
        self._places = {key: place for place, key in enumerate(pattern)}
        self._automata = [
            (place, key, _Automaton(key, where)) for key, place in self._places.items() if not _NAME.fullmatch(key)
        ]
        self._steps = 0

    def value(self, module: str, default: Any) -> Any:
        """Return the value of the first key that matches a module's name, as PEFT does.

        Raises:
            UserError: the file's patterns took too many steps.
        """
        best = min((self._places[name] for name in _endings(module) if name in self._places), default=None)
        for place, key, automaton in self._automata:
            if best is not None and place > best:
                break
            found, steps = automaton.matches(module)
            self._steps += steps
            if self._steps > _MAX_STEPS:
                raise UserError(
                    f"{self._where}: the pattern {shown(key)} takes too long; write the modules' names out."
                )
            if found:
                return self._values[place]
        return default if best is None else self._values[best]


def _endings(module: str) -> Iterator[str]:
    """Yield the names that stand for a module: its own, with ^ before it, and what follows each of its dots."""
    yield module
    yield f"^{module}"
    for place, letter in enumerate(module):
        if letter == ".":
            yield module[place + 1 :]


@dataclass
class _State:
    atom: re.Pattern[str] | str | None
    """What one character must match; "^" or "$" for a place; None to go on without one."""
    after: list[int]


class _Automaton:
    """The states of `(.*\\.)?(key)$`, built by descending through the pattern (Thompson's construction)."""

    def __init__(self, key: str, where: str) -> None:
        self._where, self._key = where, key
        if len(key) > _MAX_LENGTH:
            self._refuse(f"is longer than {_MAX_LENGTH:,} characters")
        self._text, self._at, self._depth = rf"(.*\.)?({key})$", 0, 0
        try:
            re.compile(self._text)
        except (re.error, OverflowError, RecursionError) as error:
            self._refuse(f"is no regular expression ({error})")
        self._states: list[_State] = []
        self._atoms: dict[str, re.Pattern[str]] = {}
        self._start, self._end = self._alternatives()
        if self._at != len(self._text):
            self._refuse("is no regular expression that can be matched here")

    def matches(self, name: str) -> tuple[bool, int]:
        """Return whether the whole of `name` matches, and the positions visited."""
        steps, now = 0, self._reach([self._start], at_start=True, at_end=not name)
        for place, letter in enumerate(name):
            steps += len(now)
            following = []
            for number in now:
                atom = self._states[number].atom
                if isinstance(atom, re.Pattern) and atom.fullmatch(letter):
                    following += self._states[number].after
            now = self._reach(following, at_start=False, at_end=place + 1 == len(name))
            if not now:
                break
        return self._end in now, steps + len(now)

    def _reach(self, numbers: list[int], *, at_start: bool, at_end: bool) -> set[int]:
        """Return all states that can be reached without a character."""
        found: set[int] = set()
        left = list(numbers)
        while left:
            number = left.pop()
            if number in found:
                continue
            found.add(number)
            state = self._states[number]
            passes = state.atom is None or (state.atom == "^" and at_start) or (state.atom == "$" and at_end)
            if passes:
                left += state.after
        return found

    # ---- from text to states --------------------------------------------------------------------------------------

    def _new(self, atom: re.Pattern[str] | str | None = None, *after: int) -> int:
        if len(self._states) >= _MAX_STATES:
            self._refuse("is too large")
        self._states.append(_State(atom, list(after)))
        return len(self._states) - 1

    def _alternatives(self) -> tuple[int, int]:
        self._depth += 1
        if self._depth > _MAX_GROUPS:
            self._refuse("has too many groups inside one another")
        start, end = self._new(), self._new()
        while True:
            first, last = self._sequence()
            self._states[start].after.append(first)
            self._states[last].after.append(end)
            if self._peek() != "|":
                self._depth -= 1
                return start, end
            self._at += 1

    def _sequence(self) -> tuple[int, int]:
        start = last = self._new()
        while self._peek() not in ("", "|", ")"):
            first, following = self._repeated()
            self._states[last].after.append(first)
            last = following
        return start, last

    def _repeated(self) -> tuple[int, int]:
        begin, copies = self._at, [self._one()]
        least, most = self._quantifier()
        resume = self._at
        for _ in range(1, max(least, 1) if most is None else most):
            self._at = begin
            copies.append(self._one())
        self._at = resume
        start = end = self._new()
        for number, (first, last) in enumerate(copies if most != 0 else []):
            over = self._new()
            self._states[end].after += [first] if number < least else [first, over]
            self._states[last].after.append(over)
            end = over
        if most is None:
            first, last = copies[-1]
            self._states[last].after.append(first)
        return start, end

    def _quantifier(self) -> tuple[int, int | None]:
        """Return how often what was just read may stand there: least, and most or None for no end."""
        least: int
        most: int | None
        if (letter := self._peek()) in _SHORT:
            self._at += 1
            least, most = _SHORT[letter]
        else:
            match = _QUANTIFIER.match(self._text, self._at)
            if match is None:
                return 1, 1
            self._at = match.end()
            least = int(match["least"] or 0)
            most = int(match["most"]) if match["most"] else None if match["comma"] else least
            if max(least, most or 0) > _MAX_STATES:
                self._refuse("is too large")
        if self._peek() == "+":
            self._refuse("has a possessive quantifier")
        if self._peek() == "?":  # whether the shortest or the longest is tried first, it is a match
            self._at += 1
        return least, most

    def _one(self) -> tuple[int, int]:
        letter = self._text[self._at]
        if letter == "(":
            return self._group()
        if letter in "^$":
            self._at += 1
            end = self._new()
            return self._new(letter, end), end
        if letter == "[":
            stop = self._class_end()
        elif letter == "\\":
            stop = self._escape_end()
        else:
            stop = self._at + 1
        text = self._text[self._at : stop]
        self._at = stop
        atom = self._atoms.setdefault(text, re.compile(re.escape(text) if text == "{" else text))
        end = self._new()
        return self._new(atom, end), end

    def _group(self) -> tuple[int, int]:
        self._at += 1
        if self._peek() == "?":
            if self._text.startswith("?:", self._at):
                self._at += 2
            elif named := re.compile(r"\?P<\w+>").match(self._text, self._at):
                self._at = named.end()
            else:
                self._refuse(f"has '({self._text[self._at : self._at + 3]}', which is not supported")
        found = self._alternatives()
        self._at += 1  # the closing bracket, which `re` has seen
        return found

    def _class_end(self) -> int:
        at = self._at + 1
        at += self._text.startswith("^", at)
        at += self._text.startswith("]", at)  # first of all it stands for itself
        while self._text[at] != "]":
            at += 2 if self._text[at] == "\\" else 1
        return at + 1

    def _escape_end(self) -> int:
        letter = self._text[self._at + 1]
        if letter in "dDwWsS" or not letter.isalnum():
            return self._at + 2
        self._refuse(f"has '\\{letter}', which is not supported")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _refuse(self, what: str) -> NoReturn:
        raise UserError(f"{self._where}: the pattern {shown(self._key)} {what}; write the modules' names out.")
