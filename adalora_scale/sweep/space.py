"""What a sweep varies: keys of the config, with values to choose from or a range of numbers."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from adalora_scale.errors import UserError

Settings = tuple[tuple[str, str], ...]
"""Keys and values of a trial, as text that an override takes."""
_FACTORS = (0.25, 0.5, 1, 2, 4)


@dataclass(frozen=True)
class Choices:
    """A key and the values it takes."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Range:
    """A key and the numbers it may take, both ends included."""

    key: str
    low: float
    high: float
    whole: bool
    """Whether only whole numbers."""

    @property
    def logarithmic(self) -> bool:
        """Whether equal ratios, not differences, are equally likely."""
        return not self.whole and self.low > 0


def choices(text: str) -> Choices:
    """Read `KEY=V1,V2`; a value may be a YAML list or quoted.

    Raises:
        UserError: the text is not of this form, or a value stands there twice.
    """
    key, values = _split("--grid", text, "KEY=V1,V2")
    listed = f"[{values}]"
    try:
        whole: Any = yaml.compose(listed)
        nodes = whole.value  # its marks keep every value as it was written: 1e-4 stays 1e-4
        found = tuple(listed[node.start_mark.index : node.end_mark.index] for node in nodes)
    except (yaml.YAMLError, AttributeError):
        raise UserError(f"--grid {text}: the values are no YAML; write KEY=V1,V2.") from None
    if not found:
        raise UserError(f"--grid {text} names no value; write KEY=V1,V2.")
    if len(set(map(number_or_text, found))) < len(found):
        raise UserError(f"--grid {text} names a value twice; leave one out.")
    return Choices(key, found)


def number_range(text: str) -> Range:
    """Read `KEY=LOW..HIGH`.

    Raises:
        UserError: the text is not of this form, or the range is empty.
    """
    key, values = _split("--range", text, "KEY=LOW..HIGH")
    low, separator, high = values.partition("..")
    try:
        ends = float(low), float(high)
    except ValueError:
        separator, ends = "", (0.0, 0.0)
    if not separator or not all(map(math.isfinite, ends)):
        raise UserError(f"--range {text} is not of the form KEY=LOW..HIGH with two numbers.")
    if not 0 <= ends[0] < ends[1]:
        raise UserError(f"--range {text}: LOW must be at least 0 and below HIGH.")
    return Range(key, *ends, whole=not any(mark in values.replace("..", " ").lower() for mark in ".e"))


def around(key: str, value: float) -> Choices:
    """Return five values around one, each twice the one before."""
    return Choices(key, tuple(f"{value * factor:g}" for factor in _FACTORS))


def grid(dimensions: Sequence[Choices]) -> Iterator[Settings]:
    """Yield every combination, the last key changing fastest."""
    for values in itertools.product(*(dimension.values for dimension in dimensions)):
        yield tuple(zip((dimension.key for dimension in dimensions), values, strict=True))


def _split(option: str, text: str, form: str) -> tuple[str, str]:
    key, separator, values = text.partition("=")
    if not separator or "." not in key or not values:
        raise UserError(f"{option} {text} is not of the form {form}, for example training.learning_rate=…")
    return key, values


def number_or_text(text: str) -> float | str:
    """Return the number that a value says, or the value: 1e-2 and 0.01 are one."""
    try:
        return float(text)
    except ValueError:
        return text
