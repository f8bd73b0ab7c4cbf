"""The model card of a run's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adalora_scale.config import RunConfig
from adalora_scale.config.mixing import train_entries
from adalora_scale.export.model_card import card_text, command_line, ranks_said, write_card
from adalora_scale.messages import say
from adalora_scale.tasks.registry import find_task

FIGURES = ("eval_loss", "eval_accuracy")
"""Of the final evaluation, those that are said of a run in a line."""


def write_run_card(config: RunConfig, summary: dict[str, Any], losses: list[float]) -> None:
    """Write `README.md` beside the adapter, from what run.json holds; a card that a person edited stays.

    Args:
        config: the run's.
        summary: the content of run.json.
        losses: the training losses that were logged, in order.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    folder = Path(config.training["output_dir"]).expanduser()
    budget, final = summary["budget"], summary["final"]
    sources = [entry.path for entry in train_entries(config.data.train)[0]]
    table = {
        "base model": config.model.model_name_or_path + (" (4-bit)" if config.model.load_in_4bit else ""),
        "training rows": ", ".join(sources),
        "steps": f"{summary['total_step']:,}, on {summary['world_size']} process(es), {summary['engine']}",
        "ranks": ranks_said(summary["ranks"]),
    }
    if budget and budget["unit"] == "params":
        table["adapter parameters"] = f"{budget['spent']:,}, trained to at most {budget['allowed']:,}"
    if losses:
        table["last training loss"] = f"{losses[-1]:.4f}"
    table |= {key.replace("_", " "): f"{value:.4f}" for key, value in final.items() if key in FIGURES}
    table["command"] = command_line()
    table["versions"] = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    text = card_text(
        title=folder.resolve().name,
        base=config.model.model_name_or_path,
        task=find_task(config.task),
        merged=False,
        datasets=sources,
        table=table,
    )
    if not write_card(folder, text):
        say(f"note: {folder}/README.md was written or edited by a person and stays as it is; run.json has this run")
