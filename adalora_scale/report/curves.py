"""Pictures over steps: loss, budget, speed, mean ranks; and bars of parameters. One run or several in each."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from adalora_scale.report.style import DASHES, LINES, MARKERS, canvas

Series = tuple[str, Sequence[tuple[float, float]]]
"""A name and its (x, y)."""
_LEGEND_ROW = 0.21


def lines(
    series: Sequence[Series],
    y_label: str,
    *,
    x_label: str = "step",
    stairs: bool = False,
    looks: Sequence[tuple[int, int]] | None = None,
) -> Figure:
    """Draw curves.

    Args:
        series: each with at least one point.
        y_label, x_label: of the axes.
        stairs: whether a value holds until the next one.
        looks: of each curve, the number of its colour and marker and that of its dash; None: its place is both.
    """
    columns = 1 if max(len(name) for name, _ in series) > 26 else 2
    rows = -(-len(series) // columns) if len(series) > 1 else 0
    top = 0.15 + rows * _LEGEND_ROW
    figure, axes = canvas(4.9, 2.7 + rows * _LEGEND_ROW, left=0.75, right=0.15, top=top, bottom=0.5)
    for place, (name, points) in enumerate(series):
        color, dash = looks[place] if looks is not None else (place, place)
        xs, ys = [x for x, _ in points], [y for _, y in points]
        axes.plot(
            xs,
            ys,
            color=LINES[color % len(LINES)],
            linestyle=DASHES[dash % len(DASHES)],
            marker=MARKERS[color % len(MARKERS)] if looks is not None or len(points) <= 30 else None,
            markevery=max(1, len(points) // 12),
            markersize=3.5,
            drawstyle="steps-post" if stairs else "default",
            label=name,
        )
    if rows:
        figure.legend(loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=columns, handlelength=2.6, borderaxespad=0.1)
    _finish(axes, x_label, y_label)
    return figure


def bars(names: Sequence[str], values: Sequence[Series], x_label: str) -> Figure:
    """Draw horizontal bars, a group a name.

    Args:
        names: of the groups, the first on top.
        values: one a colour: (name, [(place of the group, value), …]).
        x_label: of the axis.
    """
    legend = len(values) > 1
    top = 0.1 + len(values) * _LEGEND_ROW * legend
    left = 0.35 + 0.075 * max(len(name) for name in names)
    height = 0.3 + 0.1 * (len(values) - 1)
    figure, axes = canvas(4.9, top + 0.5 + height * len(names), left=min(left, 2.6), right=0.3, top=top, bottom=0.5)
    thick = 0.8 / len(values)
    for place, (name, points) in enumerate(values):
        at = [group - 0.4 + thick * (place + 0.5) for group, _ in points]
        color = LINES[place % len(LINES)]
        axes.barh(at, [value for _, value in points], height=thick * 0.9, color=color, label=name)
    axes.set_yticks(range(len(names)), [_cut(name) for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(False, axis="y")
    if legend:
        figure.legend(loc="upper left", bbox_to_anchor=(0.0, 1.0), ncols=1, borderaxespad=0.1)
    axes.set_xlabel(x_label)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(value)))
    return figure


def plain(value: float) -> str:
    """Return a number as an axis shows it: 1.5 k, 2 M."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def _finish(axes: Axes, x_label: str, y_label: str) -> None:
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: plain(round(value, 10))))


def _cut(name: str) -> str:
    return name if len(name) <= 30 else f"…{name[-29:]}"
