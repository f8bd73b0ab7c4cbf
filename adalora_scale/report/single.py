"""The report of one run: what it learnt, how its ranks came about, why, and what it cost."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

from adalora_scale.report.grid import groups
from adalora_scale.report.page import Page, Picture, Section, Table, shown
from adalora_scale.report.run_files import Run, flat
from adalora_scale.report.sections import MOST_TYPES, UNITS, budget, figures, loss, mean_ranks, rank_maps, speed
from adalora_scale.report.why import Decision, decision


def single(run: Run) -> Page:
    """Return the report of a run, of what its folder has of it.

    Raises:
        UserError: a file of it is damaged.
    """
    names = [run.name]
    sections = [_at_a_glance(run), loss([run], names), budget([run], names)]
    if run.ranks:
        pictures, tables = rank_maps(run, "ranks", max(run.ranks.values()))
        half = len(pictures) == 1
        text = ["How many triplets every matrix keeps."]
        sections += [Section("Ranks", text, pictures, tables, half=half), mean_ranks(run)]
    if run.scored is not None and run.scored.lines:
        sections += [_why(decision(run.scored)), _parameters(run)]
    sections += [speed([run], names), _skipped(run), *_config(run)]
    state = "finished" if run.summary is not None else f"not ended, at step {run.last_step}"
    return Page(f"AdaLoRA run {run.name}", f"{run.directory}: {state}", sections)


def _at_a_glance(run: Run) -> Section:
    rows = [(name, shown(value)) for name, value in figures(run).items() if value is not None]
    config = (run.summary or {}).get("config")
    if isinstance(config, dict):
        known = flat(config)
        for name, key in (("base model", "model.model_name_or_path"), ("task", "task"), ("data", "data.train")):
            if known.get(key) is not None:
                rows.append((name, str(known[key])))
    return Section("At a glance", list(run.notes), tables=[Table("Figures", ("figure", "value"), rows)])


def _why(found: Decision) -> Section:
    unit = UNITS.get(found.unit, found.unit)
    section = Section("Why these ranks")
    per = "score per parameter" if found.unit == "params" else "score"
    section.text.append(
        f"At step {found.step} triplets were bought in the order of {per} ({found.score}) until the budget of "
        f"{found.budget:,} {unit} was spent; {found.spent:,} were."
    )
    if found.cut is None:
        section.text.append("It paid for all of them: there is no cut.")
    else:
        gap = f"; the last one that was paid for lies {found.gap:.2%} above it" if found.gap is not None else ""
        section.text.append(
            f"The cut, the {per} of the first triplet that was not paid for, is {found.cut:.4g}{gap}. A margin is the "
            f"distance from the cut relative to it: +50% is half as much again. The last columns say how much larger a "
            f"budget surely buys the matrix's next triplet, with all that are ranked before it; one triplet of every "
            f"matrix (target_r + 1) is {found.of_each:,} {unit}."
        )
        section.pictures += _panels(found)
    rows = [
        (
            name, len(one.kept), len(one.kept) + len(one.dropped), _first(one.kept), _last(one.kept),
            _first(one.dropped), margin(one.worst), margin(one.next), one.size, one.needs,
            None if one.needs is None else f"{one.needs / found.of_each:+.2f}",
        )
        for name, one in found.standings.items()
    ]  # fmt: skip
    head = (
        "matrix", "rank", "of", "best kept score", "worst kept", "best dropped", "margin of the worst kept",
        "of the next", "parameters of a triplet", f"{unit} more for the next", "as target_r",
    )  # fmt: skip
    section.tables.append(Table("Every matrix against the cut", head, rows, folded=len(rows) > 20))
    return section


def margin(value: float | None) -> str:
    """Return a margin as people read it."""
    if value is None:
        return "–"
    return f"{value:+.1%}" if abs(value) < 10 else f"{value + 1:,.0f} ×"


def _panels(found: Decision) -> list[Picture]:
    kinds = list(groups(found.standings).items())

    def draw(own: list[str]) -> Any:
        from adalora_scale.report.maps import against_the_cut, cut_range

        return against_the_cut([found.standings[name] for name in own], cut_range(found))

    return [
        Picture(f"why-{place}", f"{kind}: every matrix's triplets as multiples of the cut.", partial(draw, own))
        for place, (kind, own) in enumerate(kinds[:MOST_TYPES])
    ]


def _parameters(run: Run) -> Section:
    sizes, ranks = run.scored.sizes if run.scored is not None else {}, run.ranks
    kinds = {kind: own for kind, own in groups(ranks).items() if all(name in sizes for name in own)}
    rows = []
    for kind, own in kinds.items():
        kept = sum(ranks[name] * sizes[name] for name in own)
        rows.append((kind, len(own), sum(ranks[name] for name in own), kept))
    total = sum(row[3] for row in rows)
    shares = [(*row, f"{row[3] / max(total, 1):.1%}") for row in rows]
    points = [(place, float(row[3])) for place, row in enumerate(rows)][:MOST_TYPES]

    def draw() -> Any:
        from adalora_scale.report.curves import bars

        return bars([row[0] for row in rows[:MOST_TYPES]], [("kept", points)], "parameters")

    section = Section("Parameters by type", half=True)
    if rows:
        section.pictures.append(Picture("parameters", "Parameters of the kept triplets, by type of matrix.", draw))
        head = ("type", "matrices", "triplets", "parameters", "share")
        section.tables.append(Table("Parameters of the kept triplets", head, shares))
    return section


def _skipped(run: Run) -> Section:
    counted = run.series("adalora/skipped_steps")
    section = Section("Steps skipped")
    if not counted or counted[-1][1] == 0:
        section.text.append("None: every step had a finite gradient." if counted else "Not recorded.")
        return section
    rows, last = [], (0, 0.0)
    for before, after in pairwise([last, *counted]):
        if after[1] > before[1]:
            rows.append((f"{before[0] + 1} to {after[0]}", int(after[1] - before[1])))
    section.text.append(f"{int(counted[-1][1])} steps had no finite gradient and changed nothing.")
    section.tables.append(Table("Where steps were skipped", ("steps", "skipped"), rows, folded=len(rows) > 20))
    return section


def _config(run: Run) -> list[Section]:
    summary = run.summary or {}
    tables = []
    for name, caption in (("config", "Config"), ("versions", "Versions"), ("hardware", "Hardware")):
        if isinstance(summary.get(name), dict):
            rows = [(key, str(value)) for key, value in flat(summary[name]).items() if value is not None]
            tables.append(Table(caption, ("key", "value"), rows, folded=True))
    return [Section("How it was made", tables=tables)] if tables else []


def _first(values: list[float]) -> float | None:
    return values[0] if values else None


def _last(values: list[float]) -> float | None:
    return values[-1] if values else None
