"""What a report consists of, and how it becomes one HTML file without scripts."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from adalora_scale.messages import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIGURE = re.compile(r"[+-][\d.,]+%?|[\d.,]+ ?[%×]")


@dataclass(frozen=True)
class Table:
    """A table; numbers stand to the right."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """Each with as many cells as the head; the first names the row."""
    folded: bool = False
    """Whether it opens on a click: the same figures as a picture, or many."""


@dataclass(frozen=True)
class Picture:
    """A picture, drawn when it is needed."""

    key: str
    """Its file's name as PNG, and what its ids begin with."""
    label: str
    """What screen readers say, and what stands under it."""
    draw: Callable[[], Figure]


@dataclass
class Section:
    """A heading with what stands under it."""

    title: str
    text: list[str] = field(default_factory=list)
    pictures: list[Picture] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    half: bool = False
    """Whether it may stand beside another one where there is room."""


@dataclass(frozen=True)
class Page:
    """A report."""

    title: str
    lead: str
    sections: list[Section]

    @property
    def pictures(self) -> list[Picture]:
        """All of them, in order."""
        return [picture for section in self.sections for picture in section.pictures]


def as_html(page: Page) -> str:
    """Return the page as one HTML file; every text in it is escaped, nothing in it runs or is fetched."""
    from jinja2 import Environment

    from adalora_scale.report.style import as_svg, drawing

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, finalize=shown)
    template = environment.from_string(files(__package__).joinpath("page.html.jinja").read_text("utf-8"))
    with drawing():
        drawn = {
            picture.key: as_svg(picture.draw(), picture.key, printable(picture.label)) for picture in page.pictures
        }
    return template.render(page=page, drawn=drawn, numeric=_numeric)


def shown(value: Any) -> Any:
    """Return a value as a page shows it: numbers readable, control characters visible."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"
    return printable(value) if type(value) is str else value


def _numeric(table: Table) -> list[bool]:
    """Tell which columns hold numbers, or texts such as +2.5%."""
    columns = range(len(table.head))
    return [c > 0 and any(_is_number(row[c]) for row in table.rows) for c in columns]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and bool(_FIGURE.fullmatch(value)))
