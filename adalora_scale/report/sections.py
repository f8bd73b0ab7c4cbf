"""Parts of a report that one run and several have in common: loss, budget, ranks; and figures read off the records."""

from __future__ import annotations

from itertools import pairwise
from statistics import median
from typing import Any

from adalora_scale.report.grid import Stack, grids, groups
from adalora_scale.report.page import Picture, Section, Table, shown
from adalora_scale.report.run_files import Run, number

UNITS = {"params": "parameters", "triplets": "triplets"}
Points = list[tuple[int, float]]
_MOST_ROWS = 60
MOST_TYPES = 24
"""As many types of matrices are drawn; tables have all."""


def loss(runs: list[Run], names: list[str]) -> Section:
    """Return training's and evaluation's loss over steps."""
    series, looks = [], []
    for place, (run, name) in enumerate(zip(runs, names, strict=True)):
        for dash, (kind, key) in enumerate((("training", "loss"), ("evaluation", "eval_loss"))):
            if points := last_of_step(run.series(key)):
                series.append((f"{name}, {kind}" if len(runs) > 1 else kind, points))
                looks.append((place, dash) if len(runs) > 1 else (dash, dash))
    if not series:
        return Section("Loss", ["No loss was logged."])
    return Section(
        "Loss",
        pictures=[Picture("loss", f"Loss over steps. {_ends(series)}", lambda: _lines(series, "loss", looks=looks))],
        tables=[_points_table("Loss as a table", series, "loss")],
        half=True,
    )


def budget(runs: list[Run], names: list[str]) -> Section:
    """Return the budget over steps, of a single run with what was spent."""
    series: list[tuple[str, Points]] = []
    units = {unit_of(run) for run in runs if run.allocations}
    for run, name in zip(runs, names, strict=True):
        if not run.allocations:
            continue
        allowed = [(line.step, float(line.budget)) for line in run.allocations]
        before = [point for point in run.series("adalora/budget")[:1] if point[0] < allowed[0][0]]
        after = [(run.last_step, allowed[-1][1])] if run.last_step and run.last_step > allowed[-1][0] else []
        series.append(("allowed" if len(runs) == 1 else name, [*before, *allowed, *after]))
        spent = [(line.step, float(line.spent)) for line in run.allocations if line.spent is not None]
        if len(runs) == 1 and spent:
            series.append(("spent", spent))
    if not series:
        return Section("Budget", ["No allocation yet: every matrix has all its triplets."])
    if len(units) > 1:
        return Section(
            "Budget", [f"The runs' budgets count different things ({', '.join(sorted(units))}): no picture."]
        )
    unit = units.pop()
    return Section(
        "Budget",
        [f"What may be spent on triplets over the whole model, in {unit}."],
        [
            Picture(
                "budget", f"Budget over steps, in {unit}. {_ends(series)}", lambda: _lines(series, unit, stairs=True)
            )
        ],
        [_points_table("Budget as a table", series, unit)],
        half=True,
    )


def speed(runs: list[Run], names: list[str]) -> Section:
    """Return tokens a second over steps; no picture where none were counted."""
    curves = [(name, run.series("tokens_per_second")) for run, name in zip(runs, names, strict=True)]
    series = [(name if len(runs) > 1 else "from", points) for name, points in curves if len(points) > 1]
    section = Section("Speed", half=True)
    if series:
        label = f"Tokens a second over steps, over all ranks. {_ends(series)}"
        section.pictures.append(Picture("speed", label, lambda: _lines(series, "tokens/s")))
        section.tables.append(_points_table("Tokens a second as a table", series, "tokens/s"))
    else:
        section.text.append("No tokens were counted.")
    return section


def mean_ranks(run: Run) -> Section:
    """Return how ranks moved over the allocations: the mean of each type, and what changed in each."""
    section = Section("How ranks moved", half=True)
    if len(run.allocations) < 2:
        section.text.append("Fewer than two allocations: nothing moved yet.")
        return section
    kinds = groups(run.allocations[-1].ranks)
    of_kind = {
        kind: [(line.step, _mean([line.ranks.get(name, 0) for name in own])) for line in run.allocations]
        for kind, own in kinds.items()
    }
    shown = list(of_kind.items())[:8]
    more = f" (the first 8 of {len(of_kind)} types; the table has all)" if len(of_kind) > 8 else ""
    section.pictures.append(
        Picture("moved", f"Mean rank of each type after every allocation{more}.", lambda: _lines(shown, "mean rank"))
    )
    steps = thinned([(line.step, float(place)) for place, line in enumerate(run.allocations)])
    places = [int(place) for _, place in steps]
    rows: list[tuple[Any, ...]] = [(kind, *(points[at][1] for at in places)) for kind, points in of_kind.items()]
    head = ("type", *(f"step {step}" for step, _ in steps))
    section.tables.append(Table("Mean rank of each type after an allocation", head, rows, folded=True))
    changes = [None] + [
        sum(before.ranks.get(name) != rank for name, rank in after.ranks.items())
        for before, after in pairwise(run.allocations)
    ]
    rows = []
    for place in places:
        line, ranks = run.allocations[place], list(run.allocations[place].ranks.values())
        rows.append(
            (line.step, line.budget, line.spent, sum(ranks), min(ranks), max(ranks), ranks.count(0), changes[place])
        )
    head = ("step", "budget", "spent", "triplets", "lowest rank", "highest", "at rank 0", "matrices that changed")
    section.tables.append(Table("Allocations", head, rows, folded=True))
    return section


def rank_maps(run: Run, key: str, highest: int, title: str = "") -> tuple[list[Picture], list[Table]]:
    """Return a run's heat maps and the distributions of experts, and the same as tables.

    Args:
        run: the run.
        key: begins the pictures' names.
        highest: the end of the scale.
        title: begins every label.
    """
    ranks = run.ranks
    stacks, others = grids(ranks)
    pictures, tables = [], []
    for place, stack in enumerate(stacks):
        shared = "; the mean where experts share a place" if stack.has_experts else ""
        own = f"{key}-{place}" if len(stacks) > 1 else key
        label = f"{title}Ranks in {stack.name}: layers down, types across{shared}."
        pictures.append(Picture(own, label, _drawn_map(stack, ranks, highest)))
        tables.append(_grid_table(stack, ranks, f"{title}Ranks in {stack.name} as a table"))
    several = {name for stack in stacks for names in stack.cells.values() if len(names) > 1 for name in names}
    experts = {kind: own for kind, own in groups(ranks).items() if several.intersection(own)}
    if experts:
        counts = [[ranks[name] for name in own] for own in experts.values()]

        def draw() -> Any:
            from adalora_scale.report.maps import rank_counts

            return rank_counts(list(experts), counts)

        pictures.append(Picture(f"{key}-experts", f"{title}Experts: how many of them have which rank.", draw))
        rows: list[tuple[Any, ...]] = [
            (kind, len(own), min(own), median(own), max(own)) for kind, own in zip(experts, counts, strict=True)
        ]
        head = ("type", "experts", "lowest rank", "median", "highest")
        tables.append(Table(f"{title}Ranks of experts", head, rows))
    if others:
        rows = [(name, ranks[name]) for name in others]
        tables.append(Table(f"{title}Matrices outside the layers", ("matrix", "rank"), rows, folded=len(rows) > 20))
    return pictures, tables


def unit_of(run: Run) -> str:
    """Return what a run's budget counts, as a word."""
    said = (run.summary or {}).get("budget")
    unit = run.scored.unit if run.scored is not None else said.get("unit") if isinstance(said, dict) else None
    return UNITS.get(str(unit), "the budget's unit")


def figures(run: Run) -> dict[str, Any]:
    """Return a run's figures by name; None is unknown."""
    summary = run.summary or {}
    said = summary.get("final")
    final: dict[str, Any] = said if isinstance(said, dict) else {}
    ranks, sizes = run.ranks, run.scored.sizes if run.scored is not None else {}
    parameters = sum(rank * sizes[name] for name, rank in ranks.items()) if ranks.keys() <= sizes.keys() else None
    memory = summary.get("peak_memory_by_rank")
    memory = [entry for entry in memory if isinstance(entry, dict)] if isinstance(memory, list) else []
    speeds = [value for _, value in run.series("tokens_per_second")]
    found: dict[str, Any] = {
        "steps": run.last_step,
        "steps of the whole run": summary.get("total_step"),
        "training loss, last logged": _last(run.series("loss")),
        "evaluation loss": number(final.get("eval_loss")) or _last(run.series("eval_loss")),
        "matrices": len(ranks) or None,
        "triplets kept": sum(ranks.values()) if ranks else None,
        "lowest and highest rank": f"{min(ranks.values())} to {max(ranks.values())}" if ranks else None,
        "matrices at rank 0": list(ranks.values()).count(0) if ranks else None,
        "parameters of the kept triplets": parameters,
        "steps skipped (no finite gradient)": _whole(_last(run.series("adalora/skipped_steps"))),
        "wall time": _duration(number(summary.get("wall_time_s"))),
        "tokens a second, median": round(median(speeds)) if speeds else None,
        "peak host memory of a rank": _gigabytes(memory, "resident_bytes"),
        "peak device memory of a rank": _gigabytes(memory, "device_bytes"),
        "engine": summary.get("engine"),
        "ranks (processes)": summary.get("world_size"),
        "device": summary["hardware"].get("device") if isinstance(summary.get("hardware"), dict) else None,
    }
    others = {f"evaluation {key[5:]}": number(value) for key, value in final.items() if key.startswith("eval_")}
    dull = ("loss", "runtime", "per_second", "num_tokens", "entropy")
    return found | {key: value for key, value in others.items() if not any(word in key for word in dull)}


def thinned(points: Points) -> Points:
    """Return at most 60 of a curve's points for a table, the last one among them."""
    every = max(1, -(-len(points) // _MOST_ROWS))
    return points[::-1][::every][::-1]


def last_of_step(points: Points) -> Points:
    """Return one point a step, the last that was written: the final evaluation may repeat a step's."""
    return sorted(dict(points).items())


def _lines(series: list[tuple[str, Points]], label: str, **options: Any) -> Any:
    from adalora_scale.report.curves import lines

    return lines(series, label, **options)


def _drawn_map(stack: Stack, ranks: dict[str, int], highest: int) -> Any:
    def draw() -> Any:
        from adalora_scale.report.maps import rank_map

        return rank_map(stack, ranks, highest)

    return draw


def _grid_table(stack: Stack, ranks: dict[str, int], caption: str) -> Table:
    rows = []
    for layer in stack.layers:
        own = [[ranks[name] for name in stack.cells.get((layer, kind), [])] for kind in stack.types]
        cells = [
            ("" if not one else one[0] if len(one) == 1 else f"{min(one)}–{max(one)}, Σ {sum(one)}") for one in own
        ]
        rows.append((layer, *cells, sum(map(sum, own))))
    return Table(caption, ("layer", *stack.heads, "sum"), rows, folded=True)


def _points_table(caption: str, series: list[tuple[str, Points]], unit: str) -> Table:
    rows = [(name, step, value) for name, points in series for step, value in thinned(points)]
    return Table(caption, ("curve", "step", unit), rows, folded=True)


def _ends(series: list[tuple[str, Points]]) -> str:
    return "; ".join(f"{name} {shown(points[0][1])} to {shown(points[-1][1])}" for name, points in series[:6]) + "."


def _mean(values: list[int]) -> float:
    return sum(values) / len(values)


def _last(points: Points) -> float | None:
    return points[-1][1] if points else None


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _duration(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _gigabytes(memory: list[dict[str, Any]], key: str) -> str | None:
    values = [value for entry in memory if (value := number(entry.get(key))) is not None]
    return f"{max(values) / 2**30:.2f} GiB" if values else None
