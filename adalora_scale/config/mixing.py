"""Entries of `data.train` that say how much each brings: {path: a.jsonl, weight: 3} or {path: a.jsonl, rows: 500}."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adalora_scale.errors import UserError, nearest

MixingKey = Literal["weight", "rows"]
_KEYS = ("path", "weight", "rows")


@dataclass(frozen=True, kw_only=True)
class TrainEntry:
    """One name in `data.train`, and how much of it is drawn."""

    path: str
    """A file or a hub id."""
    amount: float | None = None
    """Its weight against the other entries', or its rows in an epoch; None where no entry says how much."""


def train_entries(train: str | Sequence[str | Mapping[str, Any]]) -> tuple[list[TrainEntry], MixingKey | None]:
    """Return the entries of `data.train`, and which key says how much each brings (None: all are joined).

    Raises:
        UserError: an entry has another key or value, or only some entries say how much.
    """
    if isinstance(train, str):
        return [TrainEntry(path=train)], None
    if not train:
        raise UserError("data.train needs at least one file or hub id; the list is empty.")
    read = [_entry(f"data.train[{number}]", entry) for number, entry in enumerate(train)]
    keys = {key for _, key in read}
    if len(keys) > 1:
        without = next((entry.path for entry, key in read if key is None), None)
        if without is not None:
            raise UserError(
                f"data.train: '{without}' has no weight and no rows, other entries have; give all of them the same "
                "key, or none (they are then joined)."
            )
        raise UserError("data.train: some entries have a weight and others rows; use one of the two keys for all.")
    return [entry for entry, _ in read], keys.pop()


def _entry(where: str, entry: str | Mapping[str, Any]) -> tuple[TrainEntry, MixingKey | None]:
    if isinstance(entry, str):
        return TrainEntry(path=entry), None
    for key in entry:
        if key not in _KEYS:
            raise UserError(
                f"unknown key '{key}' in {where}.{nearest(str(key), _KEYS) or ' Known: ' + ', '.join(_KEYS) + '.'}"
            )
    path, weight, rows = (entry.get(key) for key in _KEYS)
    if not isinstance(path, str) or not path:
        raise UserError(f"{where}.path is {path!r}; it must be a file or a hub id.")
    if weight is not None and rows is not None:
        raise UserError(f"{where} has a weight and rows; keep one of them.")
    if weight is not None:
        fits = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not fits or not math.isfinite(weight) or weight <= 0:
            raise UserError(f"{where}.weight is {weight!r}; it must be a positive number (leave the entry out for 0).")
        return TrainEntry(path=path, amount=float(weight)), "weight"
    if rows is not None:
        if not isinstance(rows, int) or isinstance(rows, bool) or rows < 1:
            raise UserError(f"{where}.rows is {rows!r}; it must be a whole number from 1 (leave the entry out for 0).")
        return TrainEntry(path=path, amount=float(rows)), "rows"
    return TrainEntry(path=path), None
