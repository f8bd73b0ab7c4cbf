"""From the command line to a table and the winner's config."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from adalora_scale.config import apply_override, check_value, config_from_tree, read_tree
from adalora_scale.errors import INTERRUPTED_EXIT_CODE, UserError
from adalora_scale.files import replace_text, require_local
from adalora_scale.messages import say, say_json, say_text
from adalora_scale.sweep.local import Local
from adalora_scale.sweep.report import Results, at_the_edge, best_of, duration, table, winning_config
from adalora_scale.sweep.search import Listed, Optuna, Source, grid_of, require_optuna
from adalora_scale.sweep.slurm import Slurm
from adalora_scale.sweep.space import Choices, Range, around, choices, grid, number_range
from adalora_scale.sweep.trial import Outcome, Trial, finished, known_trials
from adalora_scale.training.arguments import DEFAULT_LEARNING_RATE, check_training_section

_BASE, _TRIALS = "config.yaml", "trials"


def run(arguments: argparse.Namespace) -> int:
    """Run `adalora-scale sweep`; the exit code is what its --help says.

    Raises:
        UserError: an option, a key or a value cannot be used, or the folder holds another sweep.
    """
    _check_options(arguments)
    tree = read_tree(arguments.config, arguments.overrides)
    if arguments.deepspeed:  # as RunConfig.under_deepspeed
        tree["engine"] = {"name": "deepspeed", "config": arguments.deepspeed}
    config = config_from_tree(tree)
    training = check_training_section(config)
    if config.data.eval is None and not config.data.eval_fraction:
        raise UserError("a sweep compares evaluations; set data.eval, or data.eval_fraction to hold rows out.")
    rate = check_value("training.learning_rate", training.get("learning_rate", DEFAULT_LEARNING_RATE), float)
    seed = check_value("training.seed", training.get("seed", 42), int)
    if training.get("output_store") is not None:
        raise UserError(
            "training.output_store is one run's folder, and a sweep's trials would replace one another there; remove "
            "it, and set it when the best one is trained on (best.yaml)."
        )
    dimensions = _dimensions(arguments, rate)
    _check_values(tree, dimensions)
    folder: Path = arguments.output
    require_local("--output", folder)
    where = _where(arguments, folder)
    _claim(folder, tree)
    goal = arguments.goal or ("min" if "loss" in arguments.metric else "max")
    source = _source(arguments, dimensions, seed, goal)

    progress = _Progress(goal, source, quiet=arguments.json)
    with contextlib.closing(source):
        complete = where.run(source, progress)
    results = _all_known(progress.results, folder / _TRIALS, arguments.metric, again=False)
    complete &= all(outcome.state in ("done", "failed") for outcome in results.values())
    best = best_of(results, goal)
    again = Results()
    if best and arguments.seeds and complete:
        more = Listed(Trial(best.settings, seed + 1 + number, again=True) for number in range(arguments.seeds))
        after = _Progress(goal, more, quiet=arguments.json)
        where.run(more, after)
        again = after.results
    elif arguments.seeds and not complete:
        say("the best one runs on other seeds when every trial is done: call again", to=sys.stderr)
    if best:
        again = _all_known(again, folder / _TRIALS, arguments.metric, again=True)
        again = {t: o for t, o in again.items() if Trial(t.settings, seed) == Trial(best.settings, seed)}
    _write(arguments, tree, dimensions, results, again, goal)
    if isinstance(where, Local) and where.stopping.is_set():
        say("stopped; the same command goes on", to=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    failed = any(outcome.state in ("failed", "not tried") for outcome in (*results.values(), *again.values()))
    if best is None and results and all(outcome.state == "done" for outcome in results.values()):
        say("no trial ended with a finite metric: all of them diverged", to=sys.stderr)
        failed = True
    return int(failed)


def _source(arguments: argparse.Namespace, dimensions: list[Choices | Range], seed: int, goal: str) -> Source:
    if not arguments.trials:
        return grid_of([d for d in dimensions if isinstance(d, Choices)], seed)
    journal = arguments.output / "optuna.log"
    jobs = arguments.jobs or 1
    return Optuna(dimensions, arguments.trials, seed, journal, arguments.metric, goal, jobs=jobs)


def _all_known(results: Results, trials: Path, metric: str, *, again: bool) -> Results:
    """Return this call's trials as they stand now, and those of earlier calls that are done."""
    known = dict(results)
    for trial in known_trials(trials):
        if trial.again == again and (outcome := finished(trials / trial.name, metric)):
            before = known.get(trial)
            known[trial] = replace(outcome, earlier=before is None or before.earlier)
    return known


def _check_options(arguments: argparse.Namespace) -> None:
    for option in ("trials", "jobs"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise UserError(f"--{option} is {value}; it must be at least 1.")
    if arguments.seeds < 0:
        raise UserError(f"--seeds is {arguments.seeds}; it must be at least 0.")
    if arguments.resubmit and arguments.sbatch is None:
        raise UserError("--resubmit is about jobs of --sbatch; a trial that failed here is run again anyway.")
    if arguments.trials or arguments.range:
        require_optuna()
    if arguments.range and not arguments.trials:
        raise UserError("--range is for Optuna; say how many trials it may propose with --trials N.")
    if arguments.sbatch is not None:
        for option in ("trials", "jobs", "launcher"):
            if getattr(arguments, option):
                raise UserError(
                    f"--sbatch submits a grid whose trials do not wait for each other; it cannot go with --{option}."
                )


def _dimensions(arguments: argparse.Namespace, learning_rate: float) -> list[Choices | Range]:
    dimensions: list[Choices | Range] = [*map(number_range, arguments.range), *map(choices, arguments.grid)]
    if not dimensions:
        return [around("training.learning_rate", learning_rate)]
    keys = [dimension.key for dimension in dimensions]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{key} is varied twice; give each key once, by --grid or by --range.")
        if key in ("training.output_dir", "training.output_store", "training.seed", "training.resume_from_checkpoint"):
            raise UserError(f"{key} is the sweep's own to set; --seeds N runs the best one on other seeds.")
    return dimensions


def _check_values(tree: dict[str, Any], dimensions: list[Choices | Range]) -> None:
    """Build every combination's config (of a range its ends), so that a wrong key or value is refused at once."""
    ends = [
        d
        if isinstance(d, Choices)
        else Choices(d.key, tuple(f"{x:.0f}" if d.whole else f"{x:g}" for x in (d.low, d.high)))
        for d in dimensions
    ]
    for settings in grid(ends):
        tried = deepcopy(tree)
        for key, value in settings:
            apply_override(tried, f"{key}={value}")
        check_training_section(config_from_tree(tried))


def _claim(folder: Path, tree: dict[str, Any]) -> None:
    """Write the config that all trials start from; refuse a folder of another one."""
    text = yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    base = folder / _BASE
    try:
        if base.exists():
            known = yaml.safe_load(base.read_text("utf-8"))
            if known != tree:
                key = next(key for key in {**known, **tree} if known.get(key) != tree.get(key))
                raise UserError(
                    f"--output {folder} holds a sweep of another config (its {key} differs); choose another."
                )
            return
        if folder.exists() and any(folder.iterdir()):
            raise UserError(f"--output {folder} holds other files; choose an empty or new folder.")
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(base, text)
    except OSError as error:
        raise UserError(f"--output {folder} cannot be written: {error.strerror}.") from None


def _where(arguments: argparse.Namespace, folder: Path) -> Local | Slurm:
    base, trials = folder / _BASE, folder / _TRIALS
    if arguments.sbatch is not None:
        return Slurm(base, trials, arguments.metric, arguments.sbatch, resubmit=arguments.resubmit)
    return Local(base, trials, arguments.metric, arguments.launcher, arguments.jobs or 1)


class _Progress:
    """Collects outcomes and says a line for each: how many, what it came to, the best so far, the time that is left."""

    def __init__(self, goal: str, source: Source, *, quiet: bool) -> None:
        self.results: Results = {}
        self._goal, self._source, self._quiet = goal, source, quiet
        self._started = time.monotonic()
        self._ran = 0

    def __call__(self, trial: Trial, outcome: Outcome) -> None:
        self._ran += not outcome.earlier
        self.results[trial] = outcome
        best = best_of(self.results, self._goal)
        words = outcome.reason if outcome.value is None else f"{outcome.value:.4f}"
        if outcome.diverged:
            words = f"but given up: {outcome.why}" if outcome.reason else "but diverged"
        if outcome.earlier:
            words += " (an earlier call)"
        if best == trial and not trial.again:
            words += ", the best so far"
        left = self._source.total - len(self.results)
        spent = time.monotonic() - self._started
        rest = f"; about {duration(spent / self._ran * left)} left" if left > 0 and self._ran and spent > 5 else ""
        line = f"[{len(self.results)}/{self._source.total}] {trial}: {outcome.state} {words}{rest}"
        say(line, to=sys.stderr if self._quiet else sys.stdout)


def _write(
    arguments: argparse.Namespace,
    tree: dict[str, Any],
    dimensions: list[Choices | Range],
    results: Results,
    again: Results,
    goal: str,
) -> None:
    folder: Path = arguments.output
    shown = table(results, again, arguments.metric, goal)
    best = best_of(results, goal)
    replace_text(folder / "table.md", shown)
    if best:
        replace_text(folder / "best.yaml", winning_config(tree, best, results[best], arguments.metric, str(folder)))
    if arguments.json:
        rows = [
            {"settings": dict(trial.settings), "seed": trial.seed, "again": trial.again}
            | asdict(outcome)
            | {"diverged": outcome.diverged, "value": outcome.finite}
            for trial, outcome in (*results.items(), *again.items())
        ]
        found = {
            "metric": arguments.metric,
            "goal": goal,
            "best": dict(best.settings) if best else None,
            "trials": rows,
        }
        say_json(found)
        return
    say_text(f"\n{shown}")
    if len(ranks := {o.ranks for o in results.values() if o.ranks}) > 1:
        say(f"note: trials ran on {' and '.join(map(str, sorted(ranks)))} processes; a batch per device differs then.")
    if best:
        for sentence in at_the_edge(best, dimensions, results):
            say(f"note: {sentence}")
        say(f"best: {best}; its adapter is in {folder / _TRIALS / best.name}")
        say(f"once more: adalora-scale train --config {folder / 'best.yaml'}")
