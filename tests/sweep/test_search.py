"""Optuna as a source of trials: what it proposes, what it remembers, and what a trial that failed does to it."""

import math

import pytest

from adalora_scale.errors import UserError
from adalora_scale.sweep.search import Optuna
from adalora_scale.sweep.space import Choices, Range
from adalora_scale.sweep.trial import Outcome

SPACE = [Range("training.learning_rate", 1e-4, 1e-1, whole=False), Choices("adalora.target_r", ("4", "8"))]


def source(tmp_path, total, goal="min", seed=3, space=SPACE):
    return Optuna(space, total, seed, tmp_path / "optuna.log", "eval_loss", goal, jobs=1)


def loss(trial):
    """Best at a rate of 1e-2 and a rank of 8."""
    settings = dict(trial.settings)
    return abs(math.log10(float(settings["training.learning_rate"])) + 2) + (settings["adalora.target_r"] == "4")


def run(found):
    trials = []
    while trial := found.take():
        trials.append(trial)
        found.tell(trial, Outcome("done", loss(trial)))
    found.close()
    return trials


def test_what_was_tried_is_given_again_first_and_nothing_twice(tmp_path):
    """Else a second call trains the first one's trials again, or shows a table without them."""
    first = run(source(tmp_path, 12))
    assert len(first) == 12 and len({trial.name for trial in first}) == 12
    assert all(1e-4 <= float(dict(trial.settings)["training.learning_rate"]) <= 1e-1 for trial in first)
    more = run(source(tmp_path, 50))
    assert more[:12] == first and len(more) == 50 and len({trial.name for trial in more}) == 50
    assert run(source(tmp_path, 5)) == more  # fewer than there are: all of them, none anew
    assert sum(map(loss, more[-20:])) / 20 < 0.8 * sum(map(loss, first[:10])) / 10  # it learns from what it is told


def test_more_is_better_where_that_is_the_goal(tmp_path):
    """Else a search for accuracy looks where it is lowest, and divergence seems best of all."""
    found = source(tmp_path, 50, "max")
    values = []
    while trial := found.take():
        values.append(-loss(trial))
        found.tell(trial, Outcome("done", math.nan if loss(trial) > 2 else -loss(trial)))
    assert sum(values[-20:]) / 20 > 0.8 * sum(values[:10]) / 10  # both are negative


def test_a_stopped_trial_comes_again_and_a_failed_one_does_not(tmp_path):
    """A trial with a checkpoint must be gone on with: its folder's name is made of its values."""
    found = source(tmp_path, 3)
    done, failed, stopped = found.take(), found.take(), found.take()
    found.tell(done, Outcome("done", 1.0))
    found.tell(failed, Outcome("failed", reason="exit code 1"))
    found.tell(stopped, Outcome("stopped"))
    assert found.take() is None
    found.close()
    again = source(tmp_path, 3)
    assert [again.take() for _ in range(2)] == [done, stopped]
    third = again.take()
    assert third not in (done, failed, stopped) and again.take() is None


def test_a_space_of_choices_is_given_once_and_ends(tmp_path):
    """TPE proposes the same values again; a trial that is done would be trained or waited for twice."""
    space = [Choices("adalora.target_r", ("2", "4")), Choices("task", ("a", "b"))]
    found, trials = source(tmp_path, 30, space=space), []
    while trial := found.take():
        trials.append(trial)
        found.tell(trial, Outcome("done", float(len(trials))))
    assert len(trials) == len(set(trials)) and 1 < len(trials) <= 4


def test_another_question_or_another_process_is_refused(tmp_path):
    """Optuna would go on minimising what is to be maximised, and end another process's trials."""
    held = source(tmp_path, 3)
    with pytest.raises(UserError, match="another sweep"):
        source(tmp_path, 3)
    held.close()
    for other in ({"goal": "max"}, {"space": SPACE[:1]}, {"space": [SPACE[0], Choices("adalora.target_r", ("4",))]}):
        with pytest.raises(UserError, match=r"another metric or over other values"):
            source(tmp_path, 3, **other)
