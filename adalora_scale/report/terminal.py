"""A run's ranks and the reasons for them in a terminal: in colour where there is one, plain text elsewhere."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adalora_scale.errors import UserError
from adalora_scale.messages import printable
from adalora_scale.report.grid import Stack, grids
from adalora_scale.report.names import METRICS_NAME, SCORES_NAME
from adalora_scale.report.run_files import read_scored
from adalora_scale.report.sections import UNITS
from adalora_scale.report.why import Decision, Standing, decision, find_module

# cividis at nine places: importing matplotlib for them would take longer than everything else that `inspect` does.
_SHADES = (
    (0, 34, 78), (18, 53, 112), (59, 73, 109), (87, 93, 109), (112, 113, 115), (138, 134, 120), (165, 156, 116),
    (195, 179, 105), (254, 232, 56),
)  # fmt: skip
_CHECKPOINT = re.compile(r"checkpoint-(\d+)$")


def in_colour() -> bool:
    """Whether standard output is a terminal that shows colours, and nobody said NO_COLOR (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def print_rank_maps(above: str, ranks: dict[str, int]) -> bool:
    """Print the ranks as coloured tables, a row a layer, a column a type.

    Args:
        above: printable lines to print before them.
        ranks: module → kept triplets.

    Returns:
        False where the terminal is too narrow; nothing was printed then.
    """
    from rich.console import Console

    console = Console(highlight=False, markup=False, emoji=False)
    stacks, others = grids(ranks)
    highest = max(ranks.values(), default=0)
    tables = [_stack_table(stack, ranks, highest) for stack in stacks]
    if others:
        rows: list[list[Any]] = [[name, [ranks[name]]] for name in others]
        tables.append(_table("ranks", ["matrix", "rank"], rows, highest))
    if any(len(line) > console.width for table in tables for line in table):
        return False
    console.print(above)
    for table in tables:
        console.print()
        for line in table:
            console.print(line, no_wrap=True)
    return True


def reasons(directory: Path, module: str) -> tuple[Decision, Standing]:
    """Return the last recorded allocation of a run, and how a matrix stood in it.

    Args:
        directory: the run's output_dir, or a checkpoint in it, which knows the allocations before it.
        module: the matrix's name, its end, or a part of it.

    Raises:
        UserError: nothing was recorded there, or the name means none or several matrices.
    """
    scored, until = read_scored(directory), None
    if scored is None and (match := _CHECKPOINT.search(directory.resolve().name)):
        scored, until = read_scored(directory.resolve().parent), int(match[1])
    lines = [line for line in scored.lines if until is None or line["step"] <= until] if scored is not None else []
    if scored is None or not lines:
        running = " yet" if (directory / METRICS_NAME).is_file() else ""
        raise UserError(
            f"--why needs the scores of an allocation, and {directory} has none{running} ({SCORES_NAME} of a run's "
            f"output_dir; runs write it from their first allocation on)."
        )
    found = decision(scored, lines[-1])
    return found, found.standings[find_module(module, scored.modules)]


def why_json(found: Decision, standing: Standing) -> dict[str, Any]:
    """Return what `inspect --why --json` prints."""
    said = {key: value for key, value in vars(found).items() if key != "standings"}
    return said | asdict(standing)


def why_text(found: Decision, standing: Standing) -> str:
    """Return the lines that a person reads."""
    unit = UNITS.get(found.unit, found.unit)
    count = len(standing.kept) + len(standing.dropped)
    per = " a parameter" if found.unit == "params" else ""
    lines = [
        f"{printable(standing.module)}: rank {len(standing.kept)} of {count} after the allocation at step {found.step}",
        f"  budget    {found.budget:,} {unit}, {found.spent:,} spent; a triplet here has {standing.size:,} parameters",
    ]
    if found.cut is None:
        lines.append("  cut       none: the budget pays for every triplet")
    else:
        lines.append(f"  cut       {found.cut:.6g}{per} ({found.score}): the first triplet that was not paid for")
    if standing.needs is None:
        lines.append("  next      none: all its triplets are kept")
    else:
        share = standing.needs / found.of_each
        lines.append(
            f"  next      at {standing.needs:,} {unit} more budget at most (target_r {share:+.3f}), with all that is "
            f"ranked before it"
        )
    lines += ["", f"{'triplet':>9}  {'score':>12}  {'margin':>9}"]
    for place, score in enumerate([*standing.kept, *standing.dropped], start=1):
        margin = "–" if not found.cut else _said(score / standing.cost / found.cut - 1)
        state = "kept" if place <= len(standing.kept) else "dropped"
        lines.append(f"{place:>9}  {score:>12.6g}  {margin:>9}  {state}")
    return "\n".join(lines)


def _said(margin: float) -> str:
    return f"{margin:+.1%}" if abs(margin) < 10 else f"{margin + 1:,.0f} ×"


def _stack_table(stack: Stack, ranks: dict[str, int], highest: int) -> list[Any]:
    rows: list[list[Any]] = []
    for layer in stack.layers:
        cells = [[ranks[name] for name in stack.cells.get((layer, kind), [])] for kind in stack.types]
        rows.append([layer, *cells, sum(map(sum, cells))])
    sums = [sum(sum(row[column]) for row in rows) for column in range(1, len(stack.types) + 1)]
    return _table(f"ranks in {stack.name}", ["layer", *stack.heads, "sum"], [*rows, ["sum", *sums, sum(sums)]], highest)


def _table(title: str, head: list[str], rows: list[list[Any]], highest: int) -> list[Any]:
    """Return a table's lines; lists of ranks are shaded cells, other values plain."""
    from rich.text import Text

    said = [[printable(name) for name in head]] + [[_words(value) for value in row] for row in rows]
    widths = [max(len(line[column]) for line in said) + 2 for column in range(len(head))]
    lines = [Text(printable(title), style="bold")]
    for place, words in enumerate(said):
        line = Text()
        for column, (word, width) in enumerate(zip(words, widths, strict=True)):
            value = rows[place - 1][column] if place else None
            style = _shade(value, highest) if isinstance(value, list) and value else "" if place else "bold"
            line.append(f"{word:>{width - 1}} ", style=style)
        lines.append(line)
    return lines


def _words(value: Any) -> str:
    if not isinstance(value, list):
        return printable(str(value))
    return "" if not value else str(value[0]) if len(value) == 1 else f"{min(value)}–{max(value)}"


def _shade(ranks: list[int], highest: int) -> str:
    share = sum(ranks) / len(ranks) / max(highest, 1)
    red, green, blue = _SHADES[round(share * (len(_SHADES) - 1))]
    ink = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 128 else "white"
    return f"{ink} on rgb({red},{green},{blue})"
