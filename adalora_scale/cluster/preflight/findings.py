"""One line of the verdict, and the table of all of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from adalora_scale.messages import printable

Status = Literal["ok", "FAIL", "note", "skipped"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What one check found in one place."""

    check: str
    """The name of the check, for example `link between hosts`."""
    where: str
    """`all ranks`, a host, a rank, or a link `a → b`."""
    status: Status
    """FAIL makes the exit code 1; a note does not."""
    text: str
    """What was found, and on a failure what is expected."""
    value: float | None = None
    limit: float | None = None
    unit: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return what JSON holds."""
        return asdict(self)


def failed(findings: Iterable[Finding]) -> list[Finding]:
    """Return the failures."""
    return [finding for finding in findings if finding.status == "FAIL"]


def table(findings: list[Finding]) -> str:
    """Return the findings as lines of text, failures last, where the eye is."""
    order = sorted(findings, key=lambda finding: finding.status == "FAIL")
    rows = [tuple(map(printable, (found.status, found.check, found.where, found.text))) for found in order]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)), row[3]]).rstrip()
        for row in rows
    )
