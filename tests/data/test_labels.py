"""Labels: one class, a number or several classes; the values or a key decide, and nothing is guessed."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from adalora_scale.config import DataConfig
from adalora_scale.data.rows import load_raw
from adalora_scale.errors import UserError
from adalora_scale.tasks.label_metrics import METRICS
from adalora_scale.tasks.registry import find_task, wanted_rows

TASK = find_task("sequence_classification")


def read(folder, values, held_out=None, **options):
    names = {"train": values, **({"eval": held_out} if held_out else {})}
    for name, column in names.items():
        lines = [json.dumps({"text": "a", "label": value}) + "\n" for value in column]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    config = DataConfig(**{name: str(folder / f"{name}.jsonl") for name in names}, **options)
    return load_raw(config, wanted_rows(TASK), seed=1)


@pytest.mark.parametrize(
    ("labels", "asked", "kind", "names", "encoded"),
    [
        ([1, 0, 1], "auto", "classes", ["0", "1"], [1, 0, 1]),
        ([1.0, 2.0], "auto", "classes", ["1", "2"], [0, 1]),
        (["b", "a"], "auto", "classes", ["a", "b"], [1, 0]),
        (["1", "3"], "auto", "classes", ["1", "3"], [0, 1]),
        (["v1.5", "2.5"], "auto", "classes", ["2.5", "v1.5"], [1, 0]),
        ([0.5, 2, -1.25], "auto", "numbers", ["LABEL_0"], [0.5, 2.0, -1.25]),
        ([1, 2], "numbers", "numbers", ["LABEL_0"], [1.0, 2.0]),
        (["2.5", "3e-1", "4"], "numbers", "numbers", ["LABEL_0"], [2.5, 0.3, 4.0]),
        ([0.5, 1.5], "classes", "classes", ["0.5", "1.5"], [0, 1]),
        ([["a"], [], ["c", "a"]], "auto", "several", ["a", "c"], [[1, 0], [0, 0], [1, 1]]),
        ([["a"], "b"], "several", "several", ["a", "b"], [[1, 0], [0, 1]]),
        ([[3, 10], [10]], "auto", "several", ["3", "10"], [[1, 1], [0, 1]]),
        ([[0, 0, 1], [1, 0, 1]], "auto", "several", ["0", "1", "2"], [[0, 0, 1], [1, 0, 1]]),
        ([[0.0, 0.0], [1.0, 0.0]], "auto", "several", ["0", "1"], [[0, 0], [1, 0]]),
        ([[0, 1], [1]], "auto", "several", ["0", "1"], [[1, 1], [0, 1]]),
        (['["a", "b"]', '["b"]'], "several", "several", ["a", "b"], [[1, 1], [0, 1]]),
    ],
)  # fmt: skip
def test_what_labels_are_taken_for(tmp_path, labels, asked, kind, names, encoded):
    """Else a score becomes a class of its own, or a list of classes the text of a list."""
    raw = read(tmp_path, labels, labels=asked)
    assert (raw.label_names.kind, raw.label_names) == (kind, names)
    assert raw.train["label"][:] == encoded
    assert all(type(found) is type(1.0 if kind == "numbers" else found) for found in raw.train["label"][:])
    options = TASK.label_options(raw.label_names)
    problem = {"numbers": "regression", "several": "multi_label_classification"}
    assert options["problem_type"] == problem.get(kind, "single_label_classification")


@pytest.mark.parametrize(
    ("labels", "asked", "said"),
    [
        (["1", "2.5"], "auto", r":2: column 'label' is the text '2.5', .*data.labels=numbers"),
        ([0.5, "a"], "auto", r":2: column 'label' is the text 'a' .* number 0.5"),
        ([["a"], "b"], "auto", r":2: column 'label' is one label .*data.labels=several"),
        ([1, ["a"]], "classes", r":2: column 'label' must be one class.*data.labels=several"),
        ([1, "a"], "numbers", r":2: column 'label' must be a number, not 'a'"),
        ([1, True], "numbers", r":2: column 'label' must be a number"),
        (["inf", "1"], "numbers", r":1: column 'label' must be a number, not 'inf'"),
        ([["a", "a"]], "auto", r":1: column 'label' has a class twice"),
        ([["a"], ["a", None]], "auto", r":2: column 'label' must be a class name"),
        ([["a"], [["b"]]], "auto", r":2: column 'label' must be a class name"),
        ([[0.5, 0.5, 1]], "auto", r":1: column 'label' has 0.5"),
        ([[], []], "auto", r"no row of the training data has a label"),
    ],
)  # fmt: skip
def test_labels_that_could_be_two_things_are_asked_for(tmp_path, labels, asked, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, labels, labels=asked)


@pytest.mark.parametrize(
    ("labels", "held_out", "said"),
    [
        ([0.5, 1.5], ["a"], r"eval.jsonl:1: column 'label' must be a number"),
        ([["a"], ["b"]], [["a"], ["c"]], r"eval.jsonl:2: column 'label': label 'c' does not occur among the 2 classes"),
        ([[0, 0, 1]], [[0, 1]], r"eval.jsonl:1: column 'label' must be 3 values of 0 or 1"),
    ],
)  # fmt: skip
def test_evaluation_rows_have_the_labels_of_training(tmp_path, labels, held_out, said):
    with pytest.raises(UserError, match=said):
        read(tmp_path, labels, held_out)


def test_figures_are_those_of_scipy_and_of_counting():
    """Ties among predictions and targets are what a rank correlation written by hand gets wrong."""
    random = np.random.default_rng(0)
    predicted, wanted = random.integers(0, 6, 200) / 2, random.integers(0, 6, 200) / 2
    found = METRICS["numbers"]((predicted[:, None].astype(np.float32), wanted.astype(np.float32)))
    assert found["pearson"] == pytest.approx(stats.pearsonr(predicted, wanted)[0], abs=1e-6)
    assert found["spearman"] == pytest.approx(stats.spearmanr(predicted, wanted)[0], abs=1e-6)
    assert found["mse"] == pytest.approx(((predicted - wanted) ** 2).mean(), abs=1e-6)
    assert METRICS["numbers"]((np.ones((3, 1)), np.arange(3)))["pearson"] == 0.0
    logits, labels = np.array([[2, -1, 1], [-1, -1, -1], [1, 1, -1]]), np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0]])
    found = METRICS["several"]((logits, labels))
    assert found == {"f1_micro": pytest.approx(6 / 7), "exact_match": pytest.approx(2 / 3)}
