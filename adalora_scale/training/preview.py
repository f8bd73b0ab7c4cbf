"""`adalora-scale preview`: rows as the model will see them, before any model is loaded.

Rows are read, rendered, tokenised, cut and packed by what a run does it with, and kept for the run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any

from adalora_scale.config import RunConfig
from adalora_scale.data.rows import RawData, load_raw
from adalora_scale.data.shown import ShownRow, described_kind, marked
from adalora_scale.errors import UserError
from adalora_scale.files import replace_text
from adalora_scale.messages import printable, say, say_json, say_text
from adalora_scale.placing.positions import note_on_positions
from adalora_scale.tasks.registry import find_task, wanted_rows
from adalora_scale.training.arguments import check_training_section
from adalora_scale.training.first_example import examples, size
from adalora_scale.training.run import check_model_path, load_tokenizer

_DEFAULT_SEED = 42


@dataclass(frozen=True)
class Preview:
    """What is shown of a config's data."""

    counts: dict[str, Any]
    """Of all rows, as run.json has them (`data`)."""
    rows: list[ShownRow]
    legend: str
    """What the marks mean."""
    notes: list[str] = field(default_factory=list)
    """Of mixtures a line a source; and what is wrong with the length of rows."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON holds it."""
        return {"counts": self.counts, "notes": self.notes, "rows": [row.to_dict() for row in self.rows]}


def preview(config: RunConfig, rows: int) -> Preview:
    """Prepare a config's data as a run does, and take its first rows.

    Args:
        config: the run's.
        rows: how many of `data.train`, and as many of the evaluation's.

    Raises:
        UserError: as a run, for its model's small files, tokenizer and data; or `rows` is below 1.
    """
    if rows < 1:
        raise UserError(f"--rows is {rows}; it must be at least 1.")
    training, task = check_training_section(config), find_task(config.task)
    seed = training.get("seed", _DEFAULT_SEED)
    shape = check_model_path(config)
    raw = load_raw(config.data, wanted_rows(task), seed=seed)
    tokenizer = load_tokenizer(config)
    data = task.prepare(raw, tokenizer, config.data, seed=seed)
    shown = list(islice(examples("train", config, data, raw, tokenizer, seed=seed), rows))
    if data.eval is not None:
        shown += islice(examples("eval", config, data, raw, tokenizer, seed=seed), rows)
    note = note_on_positions(config.data.max_length, shape, data)
    notes = [*_sources(raw), *([note] if note else [])]
    return Preview(data.report, shown, described_kind(raw.label_names), notes)


def _sources(raw: RawData) -> list[str]:
    if raw.mixing is None:
        return []
    total = sum(part.amount for part in raw.mixing.parts)
    return [f"{part.name}: {part.amount / total:.1%} of what is drawn" for part in raw.mixing.parts]


def run_preview(config: RunConfig, *, rows: int, html: Path | None, as_json: bool) -> int:
    """Print a preview, or write it as a page; return the exit code."""
    found = preview(config, rows)
    if html is not None:
        replace_text(html, page(found, config))
        say(f"{html} is written: {len(found.rows)} examples")
    if as_json:
        say_json(found.to_dict())
    elif html is None:
        _print(found, config)
    return 0


def counted(counts: dict[str, Any]) -> list[str]:
    """Return a line on each part of the data: its rows, and what of it is cut, masked and dropped."""
    lines = []
    for part, prefix, other in (
        ("train", "train_", ""),
        ("eval", "eval_", "eval_"),
        ("first rows", *2 * ("first_rows_",)),
    ):
        if (rows := counts.get(f"{prefix}examples")) is None:
            continue
        tokens, trained = counts[f"{prefix}tokens"], counts[f"{other}loss_tokens"]
        dropped, cut = counts[f"{other}dropped_empty_loss"], counts[f"{other}truncated"]
        line = f"{part}: {rows:,} rows, {tokens:,} tokens, {trained:,} in the loss, {max(tokens - trained, 0):,} masked"
        line += f"; {cut:,} rows cut at data.max_length, {dropped:,} dropped (no token counts in the loss)"
        if packed := counts.get(f"{other}packed_sequences"):
            line += f"; packed into {packed:,} sequences"
        lines.append(line)
    return lines


def _print(found: Preview, config: RunConfig) -> None:
    say(*counted(found.counts), *found.notes)
    if not sys.stdout.isatty():
        say(found.legend)
        for row in found.rows:
            say("", f"{row.place} ({size(row, config)})")
            say_text(printable(marked(row), keep="\n\t"))
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    console.print(Text.assemble("tokens in ", ("green", "bold green"), " count in the loss"), end="\n")
    for row in found.rows:
        console.print()
        console.print(Text(f"{row.place} ({size(row, config)})", style="bold"))
        text = Text()
        for piece in row.pieces:
            text.append(printable(piece.text, keep="\n\t"), style="bold green" if piece.trained else "dim")
        if row.label is not None:
            text.append(f" → {printable(row.label)}", style="bold green")
        console.print(text)


_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto; padding: 0 1rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid #8888; padding-left: .8rem; }
mark { background: #1a7f3733; color: inherit; font-weight: bold; text-decoration: underline; }
h2 { font-size: 1rem; margin-bottom: 0; }
"""


def page(found: Preview, config: RunConfig) -> str:
    """Return a preview as one HTML page without anything from elsewhere; all text is escaped."""

    def shown(text: str) -> str:
        return escape(printable(text, keep="\n\t"))

    body = [f"<p>{shown(line)}</p>" for line in [*counted(found.counts), *found.notes]]
    body.append("<p><mark>Marked</mark> is what the loss counts.</p>")
    for row in found.rows:
        text = "".join(f"<mark>{shown(p.text)}</mark>" if p.trained else shown(p.text) for p in row.pieces)
        if row.label is not None:
            text += f" → <mark>{shown(row.label)}</mark>"
        body.append(f"<h2>{shown(row.place)} ({shown(size(row, config))})</h2>\n<pre>{text}</pre>")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Training data as the model sees it</title><style>{_STYLE}</style></head>\n<body>\n"
        "<h1>Training data as the model sees it</h1>\n" + "\n".join(body) + "\n</body></html>\n"
    )
