"""The rehearsal as a table."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING

from adalora_scale.cluster.rehearsal.rank import PHASES

if TYPE_CHECKING:
    from adalora_scale.cluster.rehearsal.command import Rehearsal

GROWS = 1.05
"""By how much more a figure must be at twice the size to be said to grow."""
_COLUMNS = ("operations", "reads", "collectives", "bytes", "python_s", "peak_bytes")
_HEADS = ("operations", "reads", "collectives", "bytes", "Python s", "peak bytes")


def table(found: Rehearsal) -> str:
    """Return the text that is printed."""
    request = found.request
    copies = f", {request.nodes} copies" if request.nodes > 1 else ""
    lines = [
        f"{request.config.model.model_name_or_path}, {found.engine} on {request.gpus} ranks{copies}: "
        f"{found.matrices} matrices, init_r {request.config.adalora.init_r}, score {request.config.adalora.score}"
    ]
    if found.by_rule:
        lines.append(f"by rule: {found.by_rule}")
    rows: list[tuple[str, ...]] = [("", "rank", *_HEADS)]
    for phase in PHASES:
        for number, (rank, phases) in enumerate(found.ranks.items()):
            values = asdict(phases[phase])
            shown = (_shown(name, values[name]) for name in _COLUMNS)
            rows.append((phase if number == 0 else "", str(rank), *shown))
    lines += ["", *_aligned(rows)]
    files: list[tuple[str, ...]] = [("resume of", "on", "rank", "files", "bytes read", "Python s")]
    for one in found.resumes:
        cells = (one.saved, one.ranks, one.rank, one.files)
        files.append((*map(str, cells), _shown("bytes", one.bytes), _shown("python_s", one.python_s)))
    written = ", ".join(f"rank {rank} {count:,}" for rank, count in found.written.items())
    lines += ["", *_aligned(files), "", f"save: one file a rank, and one manifest; adapter weights in it: {written}"]
    for half, what in ((found.half_ranks, "ranks"), (found.half_layers, "layers")):
        if half is not None:
            first = next(iter(found.ranks.values()))
            grown = [
                f"{phase} {head} x{ratio:.2f}"
                for phase in PHASES
                for name, head in zip(_COLUMNS, _HEADS, strict=True)
                if name != "python_s" and (ratio := _ratio(first[phase], half[phase], name)) > GROWS
            ]
            lines.append(f"grows from half the {what} to all: {', '.join(grown) or 'nothing'}")
    lines.append("not run: forward, backward and the optimizer's own arithmetic (adalora-scale plan); docs/scale.md")
    return "\n".join(lines)


def _ratio(whole: object, half: object, name: str) -> float:
    before = getattr(half, name)
    return float(getattr(whole, name) / before) if before else 1.0


def _shown(name: str, value: float) -> str:
    if name == "python_s":
        return f"{value:.2f}"
    if name.endswith("bytes") and value >= 100_000:
        return f"{value / 1e9:.2f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"
    return f"{value:,}"


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    held = list(rows)
    widths = [max(len(row[column]) for row in held) for column in range(len(held[0]))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in held]
