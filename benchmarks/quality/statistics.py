"""Means, spreads, and differences paired by seed with their intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t


@dataclass(frozen=True)
class Difference:
    """A paired difference of two methods, other minus reference."""

    mean: float
    low: float
    high: float
    """The 95 % interval of Student's t over seeds."""
    pairs: int

    @property
    def settled(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.pairs > 1 and (self.low > 0 or self.high < 0)


def paired(other: Sequence[float], reference: Sequence[float]) -> Difference:
    """Return the mean difference of values of the same seeds, with its interval.

    Raises:
        ValueError: the two are not of the same seeds, or there are none.
    """
    differences = [a - b for a, b in zip(other, reference, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(mean, float("-inf"), float("inf"), len(differences))
    half = float(t.ppf(0.975, len(differences) - 1)) * statistics.stdev(differences) / len(differences) ** 0.5
    return Difference(mean, mean - half, mean + half, len(differences))


def spread(values: Sequence[float]) -> str:
    """Return mean ± standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"
