"""docs/support.md: the tables' cells in words, the reasons of refusals, and which test shows what."""

from __future__ import annotations

import json
from collections import defaultdict
from typing import Any

from adalora_scale.engines.registry import ENGINES
from tests.conftest import ROOT
from tests.support.collecting import Cell, Cells, Found
from tests.support.tables import TABLES, Table

PAGE = ROOT / "docs" / "support.md"
RESULTS = ROOT / "benchmarks" / "results"
HEAD = """# What is supported: engines, bases, tasks, exports

    python -m tests.support            # makes this page from the tests' marks; nothing is run
    python -m tests.support --check    # exit code 1 where the page is another (a test does so too)

| word | meaning |
|---|---|
| shown | a test that runs every day does it, from end to end, and compares what comes out |
| `--full` | a test does so that only `bash tests/run.sh --full` runs |
| refused | a test sees the refusal; the number is that of the reason below the table |
| untested | no test of this combination; it may work |

All of that is on CPUs, with real process groups (gloo) and real DeepSpeed; what was seen on GPUs has a table of its
own. Model architectures are in [coverage.md](coverage.md), vendor's options that move memory in
`tests/distributed/contract_cells.py`. Tests that need a model or data beside the project are skipped where
those are not at hand. The last section says which test shows what.
"""
WHERE = {
    "plain": "fp32 compute",
    "accumulation": "accumulation",
    "checkpointing": "gradient checkpointing",
    "clip": "clipping",
    "bf16": "bf16 compute",
}
"""`verify-engines`' name of a variant → this page's."""


def page(cells: Cells) -> str:
    """Return the whole page."""
    parts = [HEAD]
    for name, table in TABLES.items():
        parts.append(f"## {table.title}\n\n{table.text}\n\n{_tables(table, cells[name])}")
    parts += [_on_gpus(), _tests(cells)]
    return "\n".join(parts)


def _tables(table: Table, found: dict[Cell, Found]) -> str:
    *outer, rows, columns = table.axes
    reasons: dict[str, int] = {}
    text = []
    for first in [(value,) for value in table.axes[outer[0]]] if outer else [()]:
        lines = [f"| {f'`{first[0]}`' if first else ''} | {' | '.join(table.axes[columns])} |"]
        lines.append(f"|---|{'---|' * len(table.axes[columns])}")
        for row in table.axes[rows]:
            words = [_word(found.get((*first, row, column)), reasons) for column in table.axes[columns]]
            lines.append(f"| {row} | {' | '.join(words)} |")
        text.append("\n".join(lines))
    if reasons:
        text.append("\n".join(f"{number}. {reason}" for reason, number in reasons.items()))
    return "\n\n".join(text) + "\n"


def _word(found: Found | None, reasons: dict[str, int]) -> str:
    if found is None:
        return "untested"
    if found.refused:
        numbers = [str(reasons.setdefault(reason, len(reasons) + 1)) for reason in sorted(found.refused)]
        return f"refused ({', '.join(numbers)})"
    return "shown" if found.default else "`--full`"


def _on_gpus() -> str:
    """What `verify-engines` found on cards, by the files that it left."""
    seen: dict[tuple[str, str], set[str]] = defaultdict(set)
    cards, bases = [], []
    for path in sorted(RESULTS.glob("verify_engines*.json")):
        result = json.loads(path.read_text())
        if result["backend"] != "nccl":
            continue
        card = f"{result['ranks']} × {result['device']}"
        base = _base(result)
        cards += [card] if card not in cards else []
        bases += [base] if base not in bases else []
        for cell in result["cells"]:
            word = WHERE[cell["variant"]] if cell["verdict"] == "pass" else f"**not** {WHERE[cell['variant']]}"
            seen[cell["engine"], f"{base}, {card}"].add(word)
    columns = [
        f"{base}, {card}" for base in bases for card in cards if any(key[1] == f"{base}, {card}" for key in seen)
    ]
    lines = [f"| | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for engine in ENGINES:
        if engine != "one process":  # the reference is one process
            words = [_in_order(seen[engine, column]) for column in columns]
            lines.append(f"| {engine} | {' | '.join(words)} |")
    return (
        "## On GPUs\n\n`adalora-scale verify-engines` over NCCL: a loop by hand equals the float64 reference at every\n"
        "allocation. From `benchmarks/results/verify_engines*.json`; one card each, so several ranks were not seen on\n"
        "GPUs.\n\n" + "\n".join(lines) + "\n"
    )


def _base(result: dict[str, Any]) -> str:
    base = "4-bit base" if result["load_in_4bit"] else "float32 base"
    return f"{base}, preset {result['preset']}" if result.get("preset", "default") != "default" else base


def _in_order(words: set[str]) -> str:
    order = [word for name in WHERE.values() for word in (name, f"**not** {name}")]
    return ", ".join(word for word in order if word in words) or "untested"


def _tests(cells: Cells) -> str:
    """Which test shows what, for each table."""
    parts = ["## Which test", ""]
    for name, table in TABLES.items():
        by_test: dict[str, set[str]] = defaultdict(set)
        for cell, found in cells[name].items():
            *rest, last = cell
            for tests, word in ((found.default, ""), (found.full, " `--full`")):
                for test in tests:
                    by_test[f"{test}{word}"].add(" · ".join([*rest, last]))
            for tests in found.refused.values():
                for test in tests:
                    by_test[f"{test} (refused)"].add(" · ".join([*rest, last]))
        parts += [f"### {table.title}", ""]
        for test in sorted(by_test):
            parts.append(f"- {_shown(test)}: {_grouped(by_test[test], table)}")
        parts.append("")
    return "\n".join(parts).rstrip() + "\n"


def _shown(test: str) -> str:
    name, _, word = test.partition(" ")
    return f"`{name}`{' ' + word if word else ''}"


def _grouped(cells: set[str], table: Table) -> str:
    """Join cells that differ in one axis: `a · b, c`."""
    split = [tuple(cell.split(" · ")) for cell in cells]
    axis = -2 if len({cell[-1] for cell in split}) == 1 else -1
    order = list(table.axes.values())[axis]
    groups: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for cell in split:
        groups[(*cell[:axis], *cell[axis:][1:])].append(cell[axis])
    parts = []
    for key, names in sorted(groups.items()):
        place = len(key) + 1 + axis
        joined = ", ".join(sorted(names, key=order.index))
        parts.append(" · ".join([*key[:place], joined, *key[place:]]))
    return "; ".join(parts)
