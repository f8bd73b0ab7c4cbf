"""The report of several runs side by side, and what differs in their configs."""

from __future__ import annotations

from typing import Any

from adalora_scale.report.grid import groups
from adalora_scale.report.page import Page, Picture, Section, Table
from adalora_scale.report.run_files import Run, flat
from adalora_scale.report.sections import MOST_TYPES, budget, figures, loss, rank_maps, speed


def compared(runs: list[Run]) -> Page:
    """Return the report of several runs.

    Raises:
        UserError: a file of one is damaged.
    """
    names = names_of(runs)
    sections = [_configs(runs, names), _figures(runs, names), loss(runs, names), budget(runs, names)]
    sections += [*_ranks(runs, names), speed(runs, names)]
    lead = "; ".join(f"{name}: {run.directory}" for run, name in zip(runs, names, strict=True))
    return Page(f"{len(runs)} AdaLoRA runs compared", lead, sections)


def names_of(runs: list[Run]) -> list[str]:
    """Return the folders' names, with their parents' where two are called the same."""
    names = [run.name for run in runs]
    if len(set(names)) == len(names):
        return names
    longer = ["/".join(run.directory.resolve().parts[-2:]) for run in runs]
    return longer if len(set(longer)) == len(longer) else [str(run.directory) for run in runs]


def config_differences(runs: list[Run]) -> dict[str, list[Any]]:
    """Return the keys that not all runs with a run.json have alike, with each run's value; output_dir is left out."""
    configs = [flat(run.summary["config"]) if _has_config(run) else None for run in runs]  # type: ignore[index]
    keys = dict.fromkeys(key for config in configs if config is not None for key in config)
    found = {}
    for key in keys:
        values = [config.get(key) for config in configs if config is not None]
        if key != "training.output_dir" and any(value != values[0] for value in values[1:]):
            found[key] = ["not known" if config is None else _said(config.get(key)) for config in configs]
    return found


def _has_config(run: Run) -> bool:
    return run.summary is not None and isinstance(run.summary.get("config"), dict)


def _configs(runs: list[Run], names: list[str]) -> Section:
    section = Section("What differs in their configs")
    without = [name for run, name in zip(runs, names, strict=True) if not _has_config(run)]
    if without:
        section.text.append(f"No run.json, so the config is not known: {', '.join(without)}.")
    differences = config_differences(runs)
    if differences:
        rows = [(key, *values) for key, values in differences.items()]
        section.tables.append(Table("Keys that differ", ("key", *names), rows))
    elif len(runs) - len(without) > 1:
        section.text.append("Nothing but their folders.")
    section.text += [f"{name}: {note}" for run, name in zip(runs, names, strict=True) for note in run.notes]
    return section


def _figures(runs: list[Run], names: list[str]) -> Section:
    each = [figures(run) for run in runs]
    keys = dict.fromkeys(key for found in each for key, value in found.items() if value is not None)
    rows = [(key, *(found.get(key) for found in each)) for key in keys]
    return Section("Figures", tables=[Table("Figures of each run", ("figure", *names), rows)])


def _ranks(runs: list[Run], names: list[str]) -> list[Section]:
    with_ranks = [(run, name) for run, name in zip(runs, names, strict=True) if run.ranks]
    if not with_ranks:
        return []
    highest = max(max(run.ranks.values()) for run, _ in with_ranks)
    section = Section("Ranks", ["How many triplets every matrix keeps; one scale for all."])
    for place, (run, name) in enumerate(with_ranks):
        pictures, tables = rank_maps(run, f"ranks-{place}", highest, f"{name}: ")
        section.pictures += pictures
        section.tables += tables
    means = Section("Ranks and parameters by type")
    kinds: dict[str, list[float | None]] = {}
    for place, (run, _) in enumerate(with_ranks):
        for kind, own in groups(run.ranks).items():
            mean = sum(run.ranks[name] for name in own) / len(own)
            kinds.setdefault(kind, [None] * len(with_ranks))[place] = round(mean, 2)
    shown = list(kinds.items())[:MOST_TYPES]
    series = [
        (name, [(group, value) for group, (_, own) in enumerate(shown) if (value := own[place]) is not None])
        for place, (_, name) in enumerate(with_ranks)
    ]

    def draw() -> Any:
        from adalora_scale.report.curves import bars

        return bars([kind for kind, _ in shown], series, "mean rank")

    means.pictures.append(Picture("means", "Mean rank of each type, by run.", draw))
    head = ("type", *(name for _, name in with_ranks))
    means.tables.append(Table("Mean rank of each type", head, [(kind, *own) for kind, own in kinds.items()]))
    if rows := _parameters(with_ranks):
        means.tables.append(Table("Parameters of each type's kept triplets", head, rows))
    if rows := _moved(with_ranks):
        head = ("matrix", *head[1:], "spread")
        caption = f"{len(rows)} matrices whose ranks differ, the widest first"
        means.tables.append(Table(caption, head, rows, folded=True))
    return [section, means]


def _parameters(runs: list[tuple[Run, str]]) -> list[tuple[Any, ...]]:
    kinds: dict[str, list[int | None]] = {}
    for place, (run, _) in enumerate(runs):
        sizes = run.scored.sizes if run.scored is not None else {}
        for kind, own in groups(run.ranks).items():
            if all(name in sizes for name in own):
                kept = sum(run.ranks[name] * sizes[name] for name in own)
                kinds.setdefault(kind, [None] * len(runs))[place] = kept
    return [(kind, *values) for kind, values in kinds.items()]


def _moved(runs: list[tuple[Run, str]]) -> list[tuple[Any, ...]]:
    rows = []
    for module in dict.fromkeys(module for run, _ in runs for module in run.ranks):
        ranks = [run.ranks.get(module) for run, _ in runs]
        known = [rank for rank in ranks if rank is not None]
        if len(set(ranks)) > 1:
            rows.append((module, *ranks, max(known) - min(known)))
    return sorted(rows, key=lambda row: -row[-1])


def _said(value: Any) -> str:
    return "–" if value is None else str(value)
