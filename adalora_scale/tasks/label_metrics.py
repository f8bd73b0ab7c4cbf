"""Figures of an evaluation of labels, one function a kind of label: Trainer's `compute_metrics`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from adalora_scale.data.labels import LabelKind

Metrics = Callable[[Any], dict[str, float]]


def accuracy(prediction: Any) -> dict[str, float]:
    """Return the share of rows whose best class is the label; logits (rows, classes), labels (rows,)."""
    logits, labels = _arrays(prediction)
    return {"accuracy": float(np.mean(np.argmax(logits, axis=-1) == labels))}


def regression(prediction: Any) -> dict[str, float]:
    """Return mean squared error, and Pearson's and Spearman's correlation (0 where either side is constant)."""
    predicted, wanted = (values.astype(np.float64).reshape(-1) for values in _arrays(prediction))  # (rows,)
    return {
        "mse": float(np.mean((predicted - wanted) ** 2)),
        "pearson": _correlation(predicted, wanted),
        "spearman": _correlation(_ranks(predicted), _ranks(wanted)),
    }


def several(prediction: Any) -> dict[str, float]:
    """Return micro F1 and the share of rows with exactly the right classes; a class is there from p = 0.5 on.

    F1 = 2 TP / (2 TP + FP + FN) over all rows and classes together, 0 where neither side has any.
    """
    logits, labels = _arrays(prediction)  # (rows, classes) both
    found, wanted = logits > 0, labels > 0.5
    hits, sides = int((found & wanted).sum()), int(found.sum() + wanted.sum())
    return {
        "f1_micro": 2 * hits / sides if sides else 0.0,
        "exact_match": float(np.mean((found == wanted).all(axis=-1))),
    }


METRICS: dict[LabelKind, Metrics] = {"classes": accuracy, "numbers": regression, "several": several}
HIGHER_IS_BETTER: dict[LabelKind, dict[str, bool]] = {
    "classes": {"accuracy": True},
    "numbers": {"mse": False, "pearson": True, "spearman": True},
    "several": {"f1_micro": True, "exact_match": True},
}
"""Of each kind's figures: whether the higher value is the better one."""


def _arrays(prediction: Any) -> tuple[np.ndarray, np.ndarray]:
    logits, labels = prediction
    return (logits[0] if isinstance(logits, tuple) else logits), labels  # BART and T5 return their encoder's states too


def _correlation(first: np.ndarray, second: np.ndarray) -> float:
    first, second = first - first.mean(), second - second.mean()
    size = float(np.sqrt((first**2).sum() * (second**2).sum()))
    return float((first * second).sum()) / size if size > 0 else 0.0


def _ranks(values: np.ndarray) -> np.ndarray:
    """Return ranks from 1; equal values share the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[places.reshape(-1)]
