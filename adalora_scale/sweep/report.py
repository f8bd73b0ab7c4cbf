"""What a sweep found: the table, the winner's config, and a word where the best value is the last one tried."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import yaml

from adalora_scale.config import apply_override
from adalora_scale.messages import printable
from adalora_scale.sweep.space import Choices, Range
from adalora_scale.sweep.trial import Outcome, Trial

Results = dict[Trial, Outcome]


def best_of(results: Results, goal: str) -> Trial | None:
    """Return the best finished trial; None where none has a finite value."""
    able = {trial: outcome.finite for trial, outcome in results.items() if outcome.finite is not None}
    if not able:
        return None
    return (min if goal == "min" else max)(able, key=able.__getitem__)


def table(results: Results, again: Results, metric: str, goal: str) -> str:
    """Return the trials as a Markdown table, best first, and the winner's seeds under it."""
    keys = list(dict.fromkeys(key for trial in results for key, _ in trial.settings))
    lines = [
        f"| {' | '.join([*keys, metric, 'adapter keeps', 'time'])} |",
        f"|{'---|' * (len(keys) + 3)}",
    ]
    for trial, outcome in sorted(results.items(), key=lambda pair: _order(pair[1], goal)):
        settings = dict(trial.settings)
        time = duration(outcome.seconds) if outcome.seconds is not None else ""
        cells = [*(settings.get(key, "").replace("|", "\\|") for key in keys), _shown(outcome), outcome.spent, time]
        lines.append(f"| {' | '.join(map(printable, cells))} |")
    best = best_of(results, goal)
    if again and best:
        lines += ["", f"The best one, {best}, on other seeds:", "", f"| seed | {metric} |", "|---|---|"]
        lines += [f"| {trial.seed} | {_shown(outcome)} |" for trial, outcome in again.items()]
        values = [outcome.finite for outcome in again.values() if outcome.finite is not None]
        if len(values) > 1:
            lines.append(
                f"| mean ± standard deviation | {statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f} |"
            )
    return "\n".join(lines) + "\n"


def duration(seconds: float) -> str:
    """Return a time as people say it."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"


def _order(outcome: Outcome, goal: str) -> tuple[bool, float]:
    if outcome.finite is None:
        return True, 0.0
    return False, outcome.finite if goal == "min" else -outcome.finite


def _shown(outcome: Outcome) -> str:
    if outcome.finite is not None:
        return f"{outcome.finite:.4f}"
    if outcome.diverged:
        said = f"given up ({outcome.why})" if outcome.reason else "diverged"
    else:
        said = f"{outcome.state} ({outcome.reason})" if outcome.reason else outcome.state
    return said.replace("|", "\\|")


def at_the_edge(best: Trial, dimensions: Iterable[Choices | Range], results: Results) -> list[str]:
    """Return a sentence for every number whose best value is the largest or smallest tried, by any call."""
    settings, found = dict(best.settings), []
    for dimension in dimensions:
        if (text := settings.get(dimension.key)) is None:
            continue  # an earlier call's winner, which did not vary it
        if isinstance(dimension, Range):
            low, high = dimension.low, dimension.high
            near = 0.05 * (high - low) if not dimension.logarithmic else 0.0
            at_low, at_high = float(text) <= max(low + near, low * 1.1), float(text) >= min(high - near, high / 1.1)
        else:
            tried = (dict(trial.settings).get(dimension.key) for trial in results)
            values = _numbers({value for value in tried if value is not None})
            if len(values) < 3:
                continue
            at_low, at_high = float(text) == min(values), float(text) == max(values)
        if at_low or at_high:
            side, more = ("largest", "larger") if at_high else ("smallest", "smaller")
            found.append(f"{dimension.key}={text} is the {side} tried; {more} ones may be better still.")
    return found


def _numbers(values: Iterable[str]) -> list[float]:
    try:
        return sorted({float(value) for value in values})
    except ValueError:
        return []


def winning_config(tree: dict[str, Any], best: Trial, outcome: Outcome, metric: str, folder: str) -> str:
    """Return the winner's config as YAML."""
    tree = deepcopy(tree)
    for key, value in best.settings:
        apply_override(tree, f"{key}={value}")
    apply_override(tree, f"training.output_dir={json.dumps(f'{folder}/best')}")
    head = f"# The best of the sweep in {folder}: {metric} {outcome.value:.4f}\n#   {best}\n"
    return head + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
