"""Rows read, checked and tokenised as a run needs them, for sets of which no copy fits on the disk or in memory.

[Note: places]
A stream is an endless order of places: place k holds one row, on every rank the same one. A rank asks for the places of
its own batches, in rising order. What lies between is read past without being tokenised; a continued run reads past
all that was trained on. So batches, ranks and resume work as for rows that lie on the disk.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from adalora_scale.data.mixing import Mixing, time_of
from adalora_scale.data.row_table import JsonText, Source, features_of
from adalora_scale.data.row_values import BadColumn, Reader
from adalora_scale.errors import UserError

logger = logging.getLogger(__name__)

FIRST_ROWS = 1000
"""Rows of each source that are checked, tokenised and counted before training."""
SHUFFLED = 1000
"""The default of `data.shuffle_buffer`."""

Tokenize = Callable[..., dict[str, list[Any]]]
_Placed = tuple[str, Mapping[str, Any]]


def first_rows(source: Source, limit: int = FIRST_ROWS) -> Source:
    """Return a source that ends after `limit` rows and is gathered in memory."""
    return replace(source, rows=lambda wanted: islice(source.rows(wanted), limit), identity=None)


@dataclass(frozen=True, kw_only=True)
class StreamedPart:
    """One entry of `data.train` (all of them where they are joined): its files and how their rows are read."""

    sources: tuple[Source, ...]
    readers: tuple[Reader, ...]


class _Line:
    """A part's rows, gone through again and again; shuffled within windows of `buffer` rows."""

    def __init__(self, part: StreamedPart, number: int, buffer: int, seed: int) -> None:
        self._part, self._number, self._buffer, self._seed = part, number, buffer, seed
        self._begin()

    def _begin(self) -> None:
        self._passes = self._base = self._read = 0
        self._rows = self._walk()
        self._window: list[tuple[_Placed, Reader]] = []
        self._start = 0

    def _walk(self) -> Iterator[tuple[_Placed, Reader]]:
        for source, reader in zip(self._part.sources, self._part.readers, strict=True):
            for placed in source.rows(reader.used):
                yield placed, reader

    def row(self, number: int) -> tuple[_Placed, Reader]:
        """Return row `number` of the endless line."""
        if number < self._start:
            self._begin()
        while number >= self._start + len(self._window):
            self._next(number)
        return self._window[number - self._start]

    def _next(self, number: int) -> None:
        found = list(islice(self._rows, self._buffer))
        if not found:
            size = self._read
            if not size:
                raise UserError(f"{self._part.sources[0].name} has no rows left to stream.")
            # The next pass; those that end before the row are not read again.
            passes = max((number - self._base) // size, 1)
            self._passes, self._base, self._read = self._passes + passes, self._base + passes * size, 0
            self._rows, self._window, self._start = self._walk(), [], self._base
            return
        if self._buffer > 1:
            key = [self._seed % 2**32, self._number, self._passes % 2**32, self._read // self._buffer % 2**32]
            found = [found[i] for i in np.random.RandomState(key).permutation(len(found))]
        self._window, self._start = found, self._base + self._read
        self._read += len(found)


class _Schedule:
    """Which part's which row stands at a place: the mixture's order, where parts have no known end."""

    def __init__(self, amounts: Sequence[float]) -> None:
        self._amounts = amounts
        self._begin()

    def _begin(self) -> None:
        self._next = 0
        self._waiting = [(time_of(part, amount), part, 0) for part, amount in enumerate(self._amounts)]
        heapq.heapify(self._waiting)

    def at(self, place: int) -> tuple[int, int]:
        """Return (part, row of its line)."""
        if place < self._next:
            self._begin()
        while True:
            _, part, row = self._waiting[0]
            amount = self._amounts[part]
            heapq.heapreplace(self._waiting, (time_of(part, amount, row + 1), part, row + 1))
            self._next += 1
            if self._next > place:
                return part, row


class TokenStream(Dataset[dict[str, list[int]]]):
    """A stream's rows as the tokens that a trainer collates, by place.

    Args:
        parts: what is read; one, or those that `mixing` mixes.
        mixing: the parts' amounts; None for one part.
        tokenize: as `data.preparing.prepare` takes it.
        buffer: rows that are shuffled together; 1 keeps the files' order.
        seed: of the order.
    """

    def __init__(
        self, parts: Sequence[StreamedPart], mixing: Mixing | None, tokenize: Tokenize, *, buffer: int, seed: int
    ) -> None:
        self._lines = [_Line(part, number, buffer, seed) for number, part in enumerate(parts)]
        self._schedule = _Schedule([part.amount for part in mixing.parts] if mixing is not None else [1.0])
        self._tokenize = tokenize
        self._said: set[str] = set()
        self.places = 0
        """Rows that the run draws: its steps times the global batch."""
        self.embedding_rows: int | None = None
        """Tokens from here on have no embedding; None: not known."""

    def __len__(self) -> int:
        return self.places

    def __getitem__(self, place: int) -> dict[str, list[int]]:
        part, number = self._schedule.at(place)
        (where, row), reader = self._lines[part].row(number)
        try:
            read = reader.read(row, set())
        except BadColumn as problem:
            raise UserError(f"{where}: {problem}.") from None
        types = features_of(reader)
        batch = {
            name: [types[name].decode_example(value) if isinstance(types[name], JsonText) else value]
            for name, value in read.items()
            if value is not None
        }
        try:
            tokens = self._tokenize(batch, [number])
        except UserError as error:
            raise UserError(f"{where}: {str(error).removeprefix(f'row {number + 1}: ')}") from None
        self._note(where, tokens)
        ids, labels = tokens["input_ids"][0], tokens["labels"][0]
        if self.embedding_rows is not None and max(ids, default=-1) >= self.embedding_rows:
            raise UserError(
                f"{where}: token {max(ids)} has no embedding; the model has {self.embedding_rows}. Name the tokenizer "
                "that belongs to it in model.tokenizer_name_or_path."
            )
        return {"input_ids": ids, "labels": labels}

    def _note(self, where: str, tokens: dict[str, list[Any]]) -> None:
        """Say once what is noted of rows, by the first of them that this rank sees."""
        notes = tokens["notes"][0].splitlines() if "notes" in tokens else []
        if not tokens["loss_tokens"][0]:
            notes.append("no token counts in the loss; such a row keeps its place and trains nothing")
        for note in notes:
            if note not in self._said:
                self._said.add(note)
                logger.warning("data: %s: %s", where, note)
