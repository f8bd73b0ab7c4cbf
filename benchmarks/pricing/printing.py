"""What `price.py` measured, as text for a terminal and as Markdown for a page."""

from __future__ import annotations

import statistics
import sys
from typing import Any

_ROW = "{:24}{:>9}{:>11}{:>12}{:>8}{:>7}{:>15}{:>9}{:>12}"


def print_table(figures: dict[str, Any]) -> None:
    """Print one shape over one kind of base."""
    size = f"{figures['matrices']} matrices, {figures['tokens']} tokens, initial rank {figures['initial_rank']}"
    print(f"\n{figures['shape']}, {figures['base']} base: {size}")
    heads = ("step ms", "update ms", "operations", "views", "reads", "at allocation", "peak MB", "parameters")
    print(_ROW.format("", *heads))
    for name, one in figures["methods"].items():
        step, allocation = one["step"], one["step_with_allocation"]
        cells = [f"{_milliseconds(one[key]):.1f}" for key in ("step_seconds", "update_seconds")]
        cells += [f"{value:,}" for value in (step["operations"] - step["views"], step["views"], step["reads"])]
        cells += [f"{allocation['operations']:,}", f"{one['peak_bytes'] / 1e6:.2f}"]
        print(_ROW.format(name, *cells, f"{one['trained_parameters']:,}"))
    for name, ratio in figures["ratios"].items():
        second = figures["update_ratios"][name]
        print(f"{name:42}{_interval(ratio):>24}    of the update alone {_interval(second):>24}")
    sys.stdout.flush()


def print_sent(sent: dict[str, Any], ranks: int) -> None:
    """Print what ranks send one another, an engine and preset a line."""
    if sent:
        print(f"\nwhat the allocator adds to a step on each of {ranks} ranks")
    for cell, one in sent.items():
        said = [
            f"{kind['collectives']} collectives, {kind['bytes']:,} bytes, {kind['operations']:,} operations"
            for kind in (one["step"], one["allocation"])
        ]
        print(f"{cell:18} {said[0]}; at an allocation {said[1]}")


def page(written: dict[str, Any]) -> str:
    """Return what `--output` wrote as Markdown: where, the ratios, the methods, and what ranks send."""
    tables = written["tables"]
    named = [f"{one['shape']}, {one['base'].removesuffix('bit')} bit" for one in tables]
    rounds = len(next(iter(tables[0]["methods"].values()))["step_seconds"])
    packages = ", ".join(f"{name} {written['versions'][name]}" for name in ("torch", "peft", "bitsandbytes"))
    device, threads = written["hardware"]["device"], written["torch_threads"]
    parts = [f"Commit {written['commit']}, {packages}; {device}, {threads} thread(s), {rounds} rounds."]
    parts.append(
        _markdown(
            ["a step beside a step", *named],
            [[name, *(_interval(one["ratios"][name]) for one in tables)] for name in tables[0]["ratios"]],
        )
    )
    parts.append(
        _markdown(
            ["ms; operations and views; peak MB", *named],
            [[method, *(_method(one["methods"][method]) for one in tables)] for method in tables[0]["methods"]],
        )
    )
    if sent := written["collectives"]:
        keys = {"collectives": "collectives", "bytes": "bytes", "operations": "operations and views"}
        heads = [f"added on each of {written['ranks']} ranks", *(f"{head}: step, allocation" for head in keys.values())]
        parts.append(_markdown(heads, [[cell, *(_both(one, key) for key in keys)] for cell, one in sent.items()]))
    return "\n\n".join(parts)


def _method(one: dict[str, Any]) -> str:
    return f"{_milliseconds(one['step_seconds']):.0f}; {one['step']['operations']:,}; {one['peak_bytes'] / 1e6:.2f}"


def _both(one: dict[str, Any], key: str) -> str:
    return f"{one['step'][key]:,}, {one['allocation'][key]:,}"


def _markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _milliseconds(seconds: list[float]) -> float:
    return 1e3 * statistics.median(seconds)


def _interval(ratio: dict[str, float]) -> str:
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"
