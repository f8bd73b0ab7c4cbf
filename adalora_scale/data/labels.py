"""What rows to classify have as their label: one class, a number, or several classes; and its form for a model.

`data.labels` says which, or the values do. Whole numbers are classes, as they are in most data sets; what could be
either (text that reads 2.5) is asked for and not guessed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

import datasets

from adalora_scale.errors import UserError
from adalora_scale.messages import quoted

LabelKind = Literal["classes", "numbers", "several"]
Place = Callable[[int], str]
"""Index of a row → where it stands, and its column."""

_NUMBER = re.compile(r"-?\d+(\.\d+)?")
_FLOAT = re.compile(r"[-+]?(\d+\.\d*|\.\d+|\d+(?=[eE]))([eE][-+]?\d+)?")


class LabelNames(list[str]):
    """Names of the classes, in the order of the model's outputs, and what a row's label is."""

    def __init__(self, names: Sequence[str], kind: LabelKind = "classes", *, hot: bool = False) -> None:
        super().__init__(names)
        self.kind = kind
        self.hot = hot
        """Whether rows of several labels give 0 or 1 for each class."""


def kind_of(label_names: Sequence[str] | None) -> LabelKind:
    """Return what labels are of these names; a plain list names classes."""
    return label_names.kind if isinstance(label_names, LabelNames) else "classes"


def find_labels(values: list[Any], asked: str, where: Place) -> tuple[LabelNames, str | None]:
    """Return the names of the classes of training rows and what a label is, and a word on what was taken for what.

    Args:
        values: the labels as `label_in` reads them: text, whole or other numbers, lists of them.
        asked: `data.labels`.
        where: says where a row is, for messages.

    Raises:
        UserError: the values do not fit what was asked for, or could be two things.
    """
    kind: LabelKind = _guessed(values, where) if asked == "auto" else asked  # type: ignore[assignment]
    taken = None
    if kind == "numbers":
        if asked == "auto":
            taken = "labels are taken for numbers (regression), as some are not whole; else set data.labels=classes"
        for index, value in enumerate(values):
            _number(value, index, where)
        return LabelNames(["LABEL_0"], kind), taken
    if kind == "classes":
        names = [_class(value, index, where) for index, value in enumerate(values)]
        return LabelNames(sorted(set(names), key=_order(names))), taken
    hot = _are_hot(values)
    if hot:
        width = len(_listed(values[0]))
        taken = f"each label is taken for {width} values of 0 or 1, one a class"
        return LabelNames([str(number) for number in range(width)], kind, hot=True), taken
    found = [name for index, value in enumerate(values) for name in _several(value, index, where)]
    if not found:
        raise UserError("data.labels: no row of the training data has a label; look at data.label_column.")
    names = LabelNames(sorted(set(found), key=_order(found)), kind)
    if asked == "auto":
        taken = f"labels are lists: each row has any number of {len(names)} classes"
    return names, taken


def encoded(dataset: datasets.Dataset, names: LabelNames, where: Place) -> datasets.Dataset:
    """Return rows whose column `label` is what the model's loss takes.

    A class's index; a float; or a float of 0 or 1 for each class.

    Raises:
        UserError: a label is not among those of the training data, or of another kind.
    """
    index = {name: number for number, name in enumerate(names)}

    def known(name: str, row: int) -> int:
        if name not in index:
            raise UserError(
                f"{where(row)}: label '{name}' does not occur among the {len(index)} classes of the training data; "
                "correct the row, or add rows of that class to data.train."
            )
        return index[name]

    labels: list[Any] = []
    for row, value in enumerate(dataset["label"][:]):
        if names.kind == "numbers":
            labels.append(_number(value, row, where))
        elif names.kind == "classes":
            labels.append(known(_class(value, row, where), row))
        elif names.hot:
            labels.append(_hot(value, len(names), row, where))
        else:
            places = {known(name, row) for name in _several(value, row, where)}
            labels.append([1.0 if place in places else 0.0 for place in range(len(names))])
    return dataset.remove_columns("label").add_column("label", labels)


def _guessed(values: list[Any], where: Place) -> LabelKind:
    lists = [isinstance(value, list) for value in values]
    if any(lists):
        if not all(lists):
            raise UserError(
                f"{where(lists.index(False))} is one label and other rows have lists; set data.labels=several to take "
                f"it for a list of one."
            )
        return "several"
    if any(isinstance(value, float) and not value.is_integer() for value in values):
        text = next((row for row, value in enumerate(values) if isinstance(value, str)), None)
        if text is not None:
            number = next(v for v in values if isinstance(v, float) and not v.is_integer())
            raise UserError(
                f"{where(text)} is the text {quoted(values[text])} and another row has the number {number}; set "
                f"data.labels=classes, or numbers (regression)."
            )
        return "numbers"
    if values and all(isinstance(value, str) and _is_number(value) for value in values):
        row = next((row for row, value in enumerate(values) if _FLOAT.fullmatch(value.strip())), None)
        if row is not None:
            raise UserError(
                f"{where(row)} is the text {quoted(values[row])}, which may be a class or a number: set "
                f"data.labels=numbers (regression), or classes."
            )
    return "classes"


def _class(value: Any, row: int, where: Place) -> str:
    if isinstance(value, list):
        raise UserError(f"{where(row)} must be one class, not {quoted(value)}: set data.labels=several.")
    if isinstance(value, float) and not value.is_integer():
        return repr(value)  # data.labels=classes
    return str(int(value)) if isinstance(value, float) else str(value)


def _number(value: Any, row: int, where: Place) -> float:
    if not isinstance(value, list | bool) and _is_number(value):
        return float(value)
    raise UserError(f"{where(row)} must be a number, not {quoted(value)} (data.labels is numbers).")


def _is_number(value: Any) -> bool:
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError):
        return False


def _listed(value: Any) -> list[Any]:
    """Return a label as a list: one label is a list of one, text in brackets (a CSV's) is JSON."""
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        value = parsed if isinstance(parsed, list) else value
    return value if isinstance(value, list) else [value]


def _several(value: Any, row: int, where: Place) -> list[str]:
    labels = _listed(value)
    for label in labels:
        if isinstance(label, list | dict) or label is None or label == "" or label != label:
            raise UserError(f"{where(row)} must be a list of class names or whole numbers, not {quoted(value)}.")
        if isinstance(label, float) and not label.is_integer():
            raise UserError(f"{where(row)} has {label}: each label of a list is a class, or 0 or 1 for each class.")
    names = [_class(label, row, where) for label in labels]
    if len(set(names)) < len(names):
        raise UserError(f"{where(row)} has a class twice: {quoted(value)}.")
    return names


def _are_hot(values: list[Any]) -> bool:
    """Whether rows give 0 or 1 for each class: lists of one length, some with a value twice, as no list of classes."""
    lists = [_listed(value) for value in values]
    if not lists or len({len(entry) for entry in lists}) != 1 or len(lists[0]) < 2:
        return False
    bits = all(isinstance(bit, int | float) and bit in (0, 1) for entry in lists for bit in entry)
    return bits and any(len(set(entry)) < len(entry) for entry in lists)


def _hot(value: Any, width: int, row: int, where: Place) -> list[float]:
    bits = _listed(value)
    if len(bits) != width or not all(isinstance(bit, int | float) and bit in (0, 1) for bit in bits):
        raise UserError(f"{where(row)} must be {width} values of 0 or 1 as in the training data, not {quoted(value)}.")
    return [float(bit) for bit in bits]


def _order(names: list[str]) -> Callable[[str], tuple[float, str]]:
    if all(_NUMBER.fullmatch(name) for name in names):
        return lambda name: (float(name), name)
    return lambda name: (0.0, name)
