"""Who says which trial comes next: the grid, or Optuna, which looks at what came of those before."""

from __future__ import annotations

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

_SETTINGS = "settings"


class Source(ABC):
    """Gives trials, one at a time; several threads may ask."""

    total: int
    """How many there will be."""

    @abstractmethod
    def take(self) -> Trial | None:
        """Return the next trial; None when there is no more."""

    def tell(self, trial: Trial, outcome: Outcome) -> None:  # noqa: B027 - a list does not mind
        """Learn what came of a trial."""


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


class Optuna(Source):
    """Optuna's TPE sampler; its journal in the sweep's folder is what resuming reads.

    Args:
        dimensions: what it chooses from.
        total: trials in all, those of earlier calls included.
        seed: of the sampler and of every run.
        journal: Optuna's file.
        goal: min or max.

    Raises:
        UserError: Optuna is not installed, or the journal is of other values.
    """

    def __init__(
        self, dimensions: Sequence[Choices | Range], total: int, seed: int, journal: Path, goal: str, *, jobs: int
    ) -> None:
        try:
            import optuna
            from optuna.storages import JournalStorage
            from optuna.storages.journal import JournalFileBackend
        except ImportError:
            raise UserError(
                "--trials and --range need Optuna: pip install 'adalora-scale[sweep]'; or give every value by --grid."
            ) from None
        logging.getLogger("optuna").setLevel(logging.WARNING)
        self._optuna, self._dimensions, self._seed = optuna, dimensions, seed
        self._lock = threading.Lock()
        self._asked: list[tuple[Trial, Any]] = []  # it may propose the same values twice
        storage = JournalStorage(JournalFileBackend(str(journal)))
        study = optuna.create_study(
            storage=storage,
            study_name="sweep",
            direction="minimize" if goal == "min" else "maximize",
            load_if_exists=True,
        )
        # A sampler that starts anew with the same seed would propose its first trials again.
        study.sampler = optuna.samplers.TPESampler(seed=seed + len(study.trials), constant_liar=jobs > 1)
        states = optuna.trial.TrialState
        self._earlier = [self._remembered(trial) for trial in study.trials if trial.state == states.COMPLETE]
        self.total = max(total, len(self._earlier))
        for trial in study.trials:
            if trial.state == states.RUNNING:  # stopped with the call that asked for it
                study.tell(trial.number, state=states.FAIL)
                study.enqueue_trial(trial.params)
        self._study = study

    def take(self) -> Trial | None:
        with self._lock:
            if self._earlier:
                return self._earlier.pop(0)  # for the table
            states = self._optuna.trial.TrialState
            counted = self._study.get_trials(deepcopy=False, states=(states.RUNNING, states.COMPLETE))
            if len(counted) >= self.total:
                return None
            asked = self._study.ask()
            trial = Trial(tuple((d.key, self._suggest(asked, d)) for d in self._dimensions), self._seed)
            asked.set_user_attr(_SETTINGS, trial.settings)
            self._asked.append((trial, asked))
            return trial

    def tell(self, trial: Trial, outcome: Outcome) -> None:
        with self._lock:
            place = next((i for i, (known, _) in enumerate(self._asked) if known == trial), None)
            if place is None:
                return  # it was told in an earlier call
            _, asked = self._asked.pop(place)
            if outcome.state == "stopped":
                return  # the next call proposes it again
            if outcome.value is None:
                self._study.tell(asked, state=self._optuna.trial.TrialState.FAIL)
                self.total -= 1  # it had its turn
            else:
                self._study.tell(asked, _finite(outcome.value, self._study.direction.name == "MINIMIZE"))

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
