"""How pictures look, and how they get into a page: SVG whose colours follow the reader's light or dark, or PNG.

matplotlib draws in colours that stand for roles; in a page each becomes a CSS variable (`page.html.jinja` gives the
values for light and dark). Lines also differ by dash and marker, shades are those of cividis: both can be told apart
with any kind of colour vision.
"""

from __future__ import annotations

import contextlib
import html
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

INK, PAPER, GRID = "#1b1e23", "#fdfdfc", "#d9dce1"
LINES = ("#0b62a4", "#d45500", "#0a8060", "#b0488a", "#8a6d00", "#4a4f9a", "#7a3b10", "#3d7c99")
"""Of the palette of Okabe and Ito, darkened until they can be read on white."""
DASHES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)), (0, (3, 1, 1, 1)), (0, (2, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
SHADES = "cividis"
_LABEL = 0.2  # inches from the left edge to the lower side of an axis' label
_VARIABLES = {INK: "--ink", PAPER: "--paper", GRID: "--grid"} | {
    color: f"--line-{place}" for place, color in enumerate(LINES)
}
_RC: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: smaller, and in the reader's font
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,  # names are no formulas
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


@contextlib.contextmanager
def drawing() -> Iterator[None]:
    """Draw inside in the page's style, whatever matplotlibrc says, and leave matplotlib as it was."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_RC)
        yield


def canvas(width: float, height: float, *, left: float, right: float, top: float, bottom: float) -> tuple[Figure, Axes]:
    """Return a figure of one pair of axes with fixed margins, all in inches (fitting them by drawing twice is slow).

    The y axis' label stands at the left edge: beside its numbers it would leave the figure where they are long.
    """
    figure = Figure(figsize=(width, height))
    box = (left / width, bottom / height, (width - left - right) / width, (height - top - bottom) / height)
    axes = figure.add_axes(box)
    across = blended_transform_factory(figure.transFigure, axes.transAxes)
    axes.yaxis.set_label_coords(_LABEL / width, 0.5, transform=across)
    return figure, axes


def as_svg(figure: Figure, key: str, label: str) -> str:
    """Return a figure as an `<svg>` element for a page.

    Args:
        figure: drawn in this module's colours.
        key: starts every id in it, unique in the page.
        label: what screen readers say instead.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": key}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.S)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r'\bid="', f'id="{key}-', text).replace("url(#", f"url(#{key}-").replace('href="#', f'href="#{key}-')
    text = re.sub(r"font(-family)?: ?([\d.]+px)? ?'DejaVu Sans'[^;\"]*", _font, text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    text = re.sub(r"\n\s*", "\n", text)
    width = round(figure.get_size_inches()[0] * 96)
    head = f'<svg role="img" aria-label="{html.escape(label)}" style="--width: {width}px" '
    text = re.sub(
        r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', lambda m: f'{head}viewBox="{m[1]}">', text, count=1, flags=re.S
    )
    return text.replace("xlink:href", "href")


def as_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG on white, for slides and papers."""
    figure.savefig(path, format="png", dpi=200, facecolor="white")


def _font(match: re.Match[str]) -> str:
    return f"font-size: {match[2]}" if match[2] else ""
