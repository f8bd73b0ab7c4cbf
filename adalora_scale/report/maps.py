"""Pictures of a whole model: ranks by layer and type, experts as a distribution, triplets against the cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from adalora_scale.report.grid import Stack, place_of, short
from adalora_scale.report.style import INK, LINES, PAPER, SHADES, canvas
from adalora_scale.report.why import Decision, Standing

_CELL = 0.5  # inches


def rank_map(stack: Stack, ranks: dict[str, int], highest: int) -> Figure:
    """Draw a stack's ranks, layers down, types across; the mean where experts share a cell.

    Args:
        stack: the grid.
        ranks: module → kept triplets.
        highest: the end of the scale, the same for every picture that is compared.
    """
    table = np.full((len(stack.layers), len(stack.types)), np.nan)
    for (layer, kind), names in stack.cells.items():
        mean = sum(ranks.get(name, 0) for name in names) / len(names)
        table[stack.layers.index(layer), stack.types.index(kind)] = mean
    several = np.array(
        [[len(stack.cells.get((layer, kind), [])) > 1 for kind in stack.types] for layer in stack.layers]
    )
    return _shaded(table, [str(layer) for layer in stack.layers], stack.heads, highest, "layer", several)


def rank_counts(kinds: Sequence[str], ranks: Sequence[Sequence[int]]) -> Figure:
    """Draw how many matrices of each type have which rank.

    Args:
        kinds: names of the types.
        ranks: of each type, its matrices' ranks.
    """
    top = max(max(own, default=0) for own in ranks)
    step = max(1, -(-(top + 1) // 16))
    starts = list(range(0, top + 1, step))
    table = np.array([[sum(first <= rank < first + step for rank in own) for own in ranks] for first in starts], float)
    table[table == 0] = np.nan
    names = [str(first) if step == 1 else f"{first}–{first + step - 1}" for first in starts]
    return _shaded(table, names, short(list(kinds)), int(np.nanmax(table)), "rank")


def _shaded(
    table: np.ndarray, rows: list[str], columns: list[str], highest: int, label: str, means: np.ndarray | None = None
) -> Figure:
    """Draw a table of shaded cells with their numbers; NaN is no cell; `means` tells which get a decimal."""
    row, slanted = 0.24, max(map(len, columns)) > 5
    head = 0.12 + (0.062 * max(map(len, columns)) if slanted else 0.2)
    right = 0.25 + (0.045 * len(columns[-1]) if slanted else 0)
    left = 0.45 + 0.07 * max(map(len, rows))
    width, height = left + right + _CELL * len(columns), head + 0.1 + row * len(rows)
    figure, axes = canvas(
        max(width, 2.2), height, left=left, right=max(width, 2.2) - width + right, top=head, bottom=0.1
    )
    shades = matplotlib.colormaps[SHADES]
    scale = max(highest, 1)
    axes.pcolormesh(np.ma.masked_invalid(table), cmap=shades, vmin=0, vmax=scale, edgecolors=PAPER, linewidth=1)
    for (y, x), value in np.ndenumerate(table):
        if not math.isnan(value):
            red, green, blue, _ = shades(min(value / scale, 1))
            dark = 0.3 * red + 0.59 * green + 0.11 * blue < 0.5
            text = f"{value:.1f}" if means is not None and means[y, x] else f"{value:.0f}"
            axes.text(x + 0.5, y + 0.52, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    turn: dict[str, Any] = {"rotation": 45, "ha": "left", "rotation_mode": "anchor"} if slanted else {}
    axes.set_xticks(np.arange(len(columns)) + 0.5, columns, **turn)
    axes.set_yticks(np.arange(len(rows)) + 0.5, rows)
    axes.set_ylabel(label)
    axes.tick_params(length=0)
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure


def cut_range(found: Decision) -> tuple[float, float]:
    """Return the ends of a scale that all of an allocation's margins fit into, as multiples of the cut."""
    margins = [margin for one in found.standings.values() for margin in (one.best, one.worst, one.next)]
    each = [1 + margin for margin in margins if margin is not None and margin > -1]
    low, high = min([0.8, *each]), max([1.25, *each])
    room = (high / low) ** 0.07  # of the height that the scale has, for the rings at its ends
    return low * min(0.6, 1 / room), high * max(1.25, room)


def against_the_cut(standings: list[Standing], ends: tuple[float, float]) -> Figure:
    """Draw matrices' triplets as multiples of the cut: what is kept as bars, the best dropped as rings.

    Args:
        standings: of matrices of one type.
        ends: of the scale.
    """
    figure, axes = canvas(4.9, 2.0, left=0.78, right=0.15, top=0.28, bottom=0.52)
    _panel(axes, standings, *ends)
    keys = [
        Line2D([], [], color=LINES[0], marker="_", linewidth=2.2, label="kept, best to worst"),
        Line2D([], [], color=INK, linestyle="--", linewidth=1, label="the cut"),
        Line2D([], [], color=LINES[1], marker="o", mfc="none", linestyle="", markersize=4, label="best dropped"),
    ]
    figure.legend(handles=keys, loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.1)
    return figure


def _panel(axes: Axes, standings: list[Standing], low: float, high: float) -> None:
    layers = [layer for one in standings if (layer := place_of(one.module).layer) is not None]
    own = len(set(layers)) == len(standings)
    xs = layers if own else list(range(len(standings)))
    kept = [
        (x, 1 + one.worst, 1 + one.best)
        for x, one in zip(xs, standings, strict=True)
        if one.worst is not None and one.best is not None
    ]
    dropped = [(x, 1 + one.next) for x, one in zip(xs, standings, strict=True) if one.next is not None]
    axes.set_yscale("log")
    if kept:
        at, worst, best = zip(*kept, strict=True)
        axes.vlines(at, worst, best, color=LINES[0], linewidth=2.2)
        axes.plot(at, worst, "_", color=LINES[0], markersize=6)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    if dropped:
        at, nearest = zip(*dropped, strict=True)
        axes.plot(at, nearest, "o", mfc="none", mec=LINES[1], markersize=4)
    axes.set_ylim(low, high)
    axes.set_ylabel("score ÷ cut")
    axes.set_xlabel("layer" if own else "matrix, by its place")
    axes.yaxis.set_major_locator(LogLocator(numticks=5))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlim(min(xs) - 0.7, max(xs) + 0.7)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True) if len(xs) > 1 else FixedLocator(xs))
