"""Several sources in one order of rows: each contributes its share at every point, small ones repeat.

[Note: the order of a mixture]
Source i, of weight w_i, is an endless line of its rows: a seeded permutation of all, then another one, and so on.
Its k-th row stands at time (k + φ_i) / w_i, where φ_i spreads the sources' first rows; the mixture is all rows by time.
Up to time t a source has brought t · w_i rows, to within one: that is its share at every point, and no chance is in it.
A packed sequence takes as much time as it holds rows. The order is a function of seed and place alone: ranks need not
talk about it, and a continued run computes where it was.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from adalora_scale.config.mixing import MixingKey
from adalora_scale.errors import UserError

_GOLDEN = (math.sqrt(5) - 1) / 2


@dataclass(frozen=True, kw_only=True)
class MixedPart:
    """One entry of `data.train`: what it is called and how much it brings."""

    name: str
    amount: float
    """Its weight, or its rows in an epoch."""
    rows: int
    """Its rows; parts stand one behind the other."""


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """How the rows of a joined table are mixed."""

    parts: tuple[MixedPart, ...]
    key: MixingKey
    limit: int | None
    """`data.max_train_samples`: rows of an epoch at most."""

    def with_rows(self, rows: Sequence[int]) -> Mixing:
        """Return the same parts with other numbers of rows.

        Raises:
            UserError: a part has none left.
        """
        parts = []
        for part, count in zip(self.parts, rows, strict=True):
            if not count:
                raise UserError(
                    f"data.train: no row of '{part.name}' has a token that counts in the loss, so it cannot be mixed; "
                    "look at its rows, data.loss_on and data.max_length, or leave it out."
                )
            parts.append(MixedPart(name=part.name, amount=part.amount, rows=count))
        return Mixing(parts=tuple(parts), key=self.key, limit=self.limit)

    def starts(self) -> list[int]:
        """Return where each part begins in the joined table, and where the last one ends."""
        return [0, *np.cumsum([part.rows for part in self.parts]).tolist()]


def limited(amounts: Sequence[float], rows: Sequence[int], limit: int | None) -> list[int]:
    """Return how many of its first rows each part keeps under `data.max_train_samples`: its share of them."""
    if limit is None:
        return list(rows)
    total = sum(amounts)
    shares = [math.ceil(limit * amount / total) for amount in amounts]
    return [min(count, share) for count, share in zip(rows, shares, strict=True)]


class Mixture:
    """The order in which prepared rows (or packed sequences) are drawn.

    Args:
        mixing: the parts, with the rows that were kept of each.
        rows_of: for each part how many rows each of its prepared items holds: ones, or a packed sequence's examples.
            Items of all parts stand one behind the other in the prepared data.
    """

    def __init__(self, mixing: Mixing, rows_of: Sequence[NDArray[np.int64]]) -> None:
        self.mixing = mixing
        starts = np.cumsum([0, *(len(rows) for rows in rows_of)])
        self._lines = [
            _Line(number, int(start), rows.astype(np.float64), part.amount)
            for number, (start, rows, part) in enumerate(zip(starts, rows_of, mixing.parts, strict=False))
        ]
        total = sum(part.amount for part in mixing.parts)
        self._shares = [part.amount / total for part in mixing.parts]
        # rows: an epoch is as long as asked. weight: until every row of every source has been drawn.
        self._epoch = 1.0 if mixing.key == "rows" else max(line.rows / line.weight for line in self._lines)
        if mixing.limit is not None:
            self._epoch = min(self._epoch, mixing.limit / total)

    @cached_property
    def epoch_length(self) -> int:
        """Items of an epoch, at least one."""
        return max(1, sum(line.drawn_by(self._epoch) for line in self._lines))

    def whole_batches(self, global_batch: int) -> int:
        """Return an epoch's items filled up to whole global batches; the next epoch goes on where it ends."""
        return math.ceil(self.epoch_length / global_batch) * global_batch

    def order(self, start: int, stop: int, *, seed: int) -> NDArray[np.int64]:
        """Return which items are drawn from place `start` of the endless order up to `stop`; (stop − start,)."""
        low, high = self._around(start, seed)[0], self._around(stop, seed)[1]
        first = [line.drawn_by(low, seed) for line in self._lines]
        last = [line.drawn_by(high, seed) for line in self._lines]
        drawn = [line.draw(a, b, seed) for line, a, b in zip(self._lines, first, last, strict=True)]
        times = np.concatenate([times for times, _ in drawn])
        items = np.concatenate([items for _, items in drawn])[np.argsort(times, kind="stable")]
        before = sum(first)
        return items[start - before : stop - before]

    def _around(self, place: int, seed: int) -> tuple[float, float]:
        """Return a time by which at most `place` items were drawn and one by which at least so many were."""

        def drawn_by(time: float) -> int:
            return sum(line.drawn_by(time, seed) for line in self._lines)

        guess = place * self._epoch / self.epoch_length
        step = len(self._lines) * self._epoch / self.epoch_length
        low, high = max(guess - step, 0.0), guess + step
        while low > 0 and drawn_by(low) > place:
            low, step = max(low - step, 0.0), 2 * step
        while drawn_by(high) < place:
            high, step = high + step, 2 * step
        # A hair wider: a row's time is computed in another order when it is counted and when it is sorted.
        return low * (1 - 1e-9), high * (1 + 1e-9)

    def identity(self) -> dict[str, Any]:
        """Return what of the mixture decides the order, beside the rows and the seed; JSON."""
        parts = [[part.amount, part.rows] for part in self.mixing.parts]
        return {"key": self.mixing.key, "parts": parts, "limit": self.mixing.limit}

    def report(self, drawn: int) -> list[dict[str, Any]]:
        """Return for each source its rows, its share of the rows drawn, and how often it is gone through.

        Args:
            drawn: items that the run draws.
        """
        epochs = drawn / self.epoch_length
        return [
            {
                "name": part.name,
                "rows": part.rows,
                "share": round(share, 6),
                "passes_per_epoch": round(self._epoch * line.weight / line.rows, 4),
                "passes": round(epochs * self._epoch * line.weight / line.rows, 4),
            }
            for part, share, line in zip(self.mixing.parts, self._shares, self._lines, strict=True)
        ]


def described(mixture: Mixture, drawn: int) -> list[str]:
    """Return a line on each source for people: its rows, its share, and how often it is gone through.

    Args:
        mixture: the order.
        drawn: items that the run draws.
    """
    lines = []
    for part in mixture.report(drawn):
        passes = f"{part['passes_per_epoch']:.2f} passes an epoch, {part['passes']:.2f} in this run"
        lines.append(f"data: {part['name']}: {part['rows']:,} rows, {part['share']:.1%} of those drawn, {passes}")
    return lines


class _Line:
    """One source's endless line of items, each pass over them in another order."""

    def __init__(self, number: int, start: int, rows_of: NDArray[np.float64], weight: float) -> None:
        self.weight = weight
        self.rows = float(rows_of.sum())
        self._number = number
        self._start = start
        self._rows_of = rows_of
        self._single = bool((rows_of == 1).all())
        self._phase = _phase(number)
        self._known: dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.float64]]] = {}

    def drawn_by(self, time: float, seed: int = 0) -> int:
        """Return how many items have been drawn by `time`."""
        rows = time * self.weight
        passes = math.floor(rows / self.rows)
        rest, items = rows - passes * self.rows, len(self._rows_of)
        if self._single:
            return passes * items + min(max(math.ceil(rest - self._phase), 0), items)
        return passes * items + int(np.searchsorted(self._pass(passes, seed)[1], rest, side="left"))

    def draw(self, first: int, last: int, seed: int) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return when the items from the `first` to before the `last` are drawn, and which; (last − first,) each."""
        size = len(self._rows_of)
        times, items = [np.empty(0)], [np.empty(0, dtype=np.int64)]
        for number in range(first // size, -(-last // size)):
            order, reached = self._pass(number, seed)
            piece = slice(max(first - number * size, 0), min(last - number * size, size))
            times.append((number * self.rows + reached[piece]) / self.weight)
            items.append(self._start + order[piece])
        return np.concatenate(times), np.concatenate(items)

    def _pass(self, number: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return a pass's order and the rows before each item, up to its phase."""
        if (seed, number) not in self._known:
            # RandomState: unlike default_rng its numbers are promised to stay the same in later versions of numpy.
            state = np.random.RandomState([seed % 2**32, self._number, number % 2**32])
            order = state.permutation(len(self._rows_of)).astype(np.int64)
            rows = self._rows_of[order]
            if len(self._known) >= 3:
                self._known.pop(next(iter(self._known)))
            self._known[seed, number] = order, np.cumsum(rows) - rows * (1 - self._phase)
        return self._known[seed, number]


def time_of(number: int, weight: float, row: int = 0) -> float:
    """Return when row `row` of the source `number` is drawn, whose rows come one by one."""
    return (row + _phase(number)) / weight


def _phase(number: int) -> float:
    # Spread between 0.1 and 0.9: sources of one weight would otherwise all come at the same moment.
    return 0.1 + 0.8 * math.fmod(0.5 + number * _GOLDEN, 1.0)


class MixtureSampler(Sampler[int]):
    """Draws an epoch of a mixture; the same numbers on every rank.

    Args:
        mixture: the order.
        seed: of the order.
        global_batch: items of an optimizer step over all ranks; an epoch is filled up to whole ones, so that no batch
            is filled otherwise on another number of ranks.
    """

    def __init__(self, mixture: Mixture, *, seed: int, global_batch: int) -> None:
        self._mixture = mixture
        self._seed = seed
        self._length = mixture.whole_batches(global_batch)
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose which epoch is drawn next."""
        self._epoch = epoch

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        start = self._epoch * self._length
        yield from self._mixture.order(start, start + self._length, seed=self._seed).tolist()
