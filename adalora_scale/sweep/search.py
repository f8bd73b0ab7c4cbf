"""Who says which trial comes next: the grid, or Optuna, which looks at what came of those before."""

from __future__ import annotations

import fcntl
import importlib.util
import logging
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from adalora_scale.errors import UserError
from adalora_scale.sweep.space import Choices, Range, grid
from adalora_scale.sweep.trial import Outcome, Trial

_SETTINGS, _QUESTION = "settings", "question"
_REPEATS = 50
"""Proposals in a row that were all made before: the space has nothing new to give."""


class Source(ABC):
    """Gives trials, one at a time; several threads may ask."""

    total: int
    """How many there will be, as far as is known."""

    @abstractmethod
    def take(self) -> Trial | None:
        """Return the next trial; None when there is no more."""

    def tell(self, trial: Trial, outcome: Outcome) -> None:  # noqa: B027 - a list does not mind
        """Learn what came of a trial."""

    def close(self) -> None:  # noqa: B027 - a list holds nothing
        """Let other processes have what the source holds."""


class Listed(Source):
    """Trials that are known from the start."""

    def __init__(self, trials: Iterable[Trial]) -> None:
        self.trials = list(trials)
        self.total = len(self.trials)
        self._left = iter(self.trials)
        self._lock = threading.Lock()

    def take(self) -> Trial | None:
        with self._lock:
            return next(self._left, None)


def grid_of(dimensions: Sequence[Choices], seed: int) -> Listed:
    """Return every combination, on one seed."""
    return Listed(Trial(settings, seed) for settings in grid(dimensions))


def require_optuna() -> None:
    """Raise a UserError where Optuna is not installed."""
    if importlib.util.find_spec("optuna") is None:
        raise UserError(
            "--trials and --range need Optuna: pip install 'adalora-scale[sweep]'; or give every value by --grid."
        )


class Optuna(Source):
    """Optuna's TPE sampler; its journal in the sweep's folder is what resuming reads.

    Args:
        dimensions: what it chooses from.
        total: trials in all, those of earlier calls included.
        seed: of the sampler and of every run.
        journal: Optuna's file; one process at a time.
        metric, goal: what is looked at, and min or max.
        jobs: trials at a time.

    Raises:
        UserError: the journal is another process's now, or of other values, another metric or another goal.
    """

    def __init__(
        self,
        dimensions: Sequence[Choices | Range],
        total: int,
        seed: int,
        journal: Path,
        metric: str,
        goal: str,
        *,
        jobs: int,
    ) -> None:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        self._file = journal.with_name(journal.name + ".held").open("w")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{journal.parent}: another sweep --trials works here; wait for it, or stop it.") from None
        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._states, self._dimensions, self._seed = optuna.trial.TrialState, dimensions, seed
        self._lock = threading.Lock()
        self._asked: dict[Trial, Any] = {}
        study = optuna.create_study(
            storage=JournalStorage(JournalFileBackend(str(journal))),
            study_name="sweep",
            direction="minimize" if goal == "min" else "maximize",
            load_if_exists=True,
        )
        question = [metric, goal, *map(repr, dimensions)]
        if study.user_attrs.setdefault(_QUESTION, question) != question:
            raise UserError(
                f"{journal.parent} holds a search for another metric or over other values; with --trials only their "
                f"number may change. Choose another --output."
            )
        study.set_user_attr(_QUESTION, question)
        # A sampler that starts anew with the same seed would propose its first trials again.
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), constant_liar=jobs > 1)
        done = [trial for trial in study.trials if trial.state == self._states.COMPLETE]
        self._values = {self._remembered(trial): trial.value for trial in done}
        self._earlier = list(self._values)
        for trial in study.trials:
            if trial.state == self._states.RUNNING:  # stopped with the call that asked for it
                study.tell(trial.number, state=self._states.FAIL)
                study.enqueue_trial(trial.params)
        self.total = max(total, len(self._earlier))
        if all(isinstance(dimension, Choices) for dimension in dimensions):
            self.total = min(self.total, math.prod(len(d.values) for d in dimensions if isinstance(d, Choices)))
        self._given = len(self._earlier)
        self._study = study

    def take(self) -> Trial | None:
        with self._lock:
            if self._earlier:
                return self._earlier.pop(0)  # for the table
            if self._given >= self.total:
                return None
            for _ in range(_REPEATS):
                asked = self._study.ask()
                trial = Trial(tuple((d.key, self._suggest(asked, d)) for d in self._dimensions), self._seed)
                asked.set_user_attr(_SETTINGS, trial.settings)
                if trial not in self._values and trial not in self._asked:
                    self._asked[trial] = asked
                    self._given += 1
                    return trial
                value = self._values.get(trial)
                self._study.tell(asked, value, state=None if value is not None else self._states.FAIL)
            return None

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        with self._lock:
            asked = self._asked.get(trial)
            if asked is None or outcome.state == "stopped":
                return  # told in an earlier call; the next call proposes it again
            if outcome.value is None:
                self._study.tell(asked, state=self._states.FAIL)
            else:
                self._values[trial] = _finite(outcome.value, self._study.direction.name == "MINIMIZE")
                self._study.tell(asked, self._values[trial])

    def close(self) -> None:
        self._file.close()

    def _remembered(self, trial: Any) -> Trial:
        return Trial(tuple((key, value) for key, value in trial.user_attrs[_SETTINGS]), self._seed)

    @staticmethod
    def _suggest(asked: Any, dimension: Choices | Range) -> str:
        if isinstance(dimension, Choices):
            return str(asked.suggest_categorical(dimension.key, dimension.values))
        if dimension.whole:
            return str(asked.suggest_int(dimension.key, int(dimension.low), int(dimension.high)))
        value = asked.suggest_float(dimension.key, dimension.low, dimension.high, log=dimension.logarithmic)
        return f"{value:.3g}"


def _finite(value: float, minimised: bool) -> float:
    """Return a very bad value where training diverged: Optuna would take NaN for a failure and learn nothing."""
    return value if math.isfinite(value) else math.copysign(1e9, 1 if minimised else -1)
