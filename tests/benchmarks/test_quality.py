"""The harness that compares methods: what it runs next, what it says of the figures, and real cells of a few steps."""

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("scipy", reason="needs the extra 'quality'")

from adalora_scale.errors import UserError
from benchmarks.quality.cell import Cell, Results, run_cell
from benchmarks.quality.curve import SHARES, curve_markdown, curve_rows, run_curve
from benchmarks.quality.jobs import run_side_by_side
from benchmarks.quality.methods import all_methods
from benchmarks.quality.rates import rates_markdown
from benchmarks.quality.search import TUNING_SEED, best_trial, final_cells, missing
from benchmarks.quality.statistics import paired
from benchmarks.quality.table import markdown, rows_of, short_markdown
from benchmarks.quality.tasks import TASKS, QualityTask, Sources, write_splits

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "quality"
TASK = QualityTask("toy", lambda sources: ([], [], []), lambda sources: "", {}, 4, 4, (1e-3, 1e-2, 1e-1))


def figures(loss, **more):
    found = {"loss": loss, "accuracy": 0.5, "count": 10}
    return {"validation": found, "parameters": 99, "budget": 100} | {
        name: found | value for name, value in more.items()
    }


def tuned(results, method, losses):
    for rate, loss in zip(TASK.learning_rates, losses, strict=True):
        results.add(Cell("toy", method, 2, rate, TUNING_SEED, False), figures(loss))


def test_the_rate_of_the_lowest_validation_loss_runs_on_the_seeds(tmp_path):
    """Else a method is judged at a rate that was not the best of its trials, or before all of them were made."""
    results = Results(tmp_path)
    cells = list(missing([TASK], ["lora"], [2], 2, results))
    assert [cell.learning_rate for cell in cells] == [1e-3, 1e-2, 1e-1] and not any(cell.final for cell in cells)
    results.add(cells[0], figures(0.1))
    known = results.of("toy")
    assert best_trial(TASK, "lora", 2, known) is None and final_cells(TASK, "lora", 2, 2, known) == []
    results.add(cells[1], figures(0.05))
    results.add(cells[2], figures(2.0))
    assert best_trial(TASK, "lora", 2, results.of("toy")).learning_rate == 1e-2
    left = list(missing([TASK], ["lora"], [2], 2, results))
    assert [(cell.seed, cell.final, cell.learning_rate) for cell in left] == [(0, True, 1e-2), (1, True, 1e-2)]
    assert TUNING_SEED not in {cell.seed for cell in left}
    results.add(left[0], figures(0.05))
    assert list(missing([TASK], ["lora"], [2], 2, Results(tmp_path))) == left[1:]  # what is on disk is not run again


def test_a_row_pairs_seeds_and_a_lower_loss_is_ahead(tmp_path):
    """A wrong sign or unpaired seeds would turn the conclusion around."""
    results = Results(tmp_path)
    for method, shift, seeds in (("lora", 0.0, 3), ("ours", -0.2, 4), ("half", 0.0, 2)):
        tuned(results, method, (0.3, 0.1, 0.2))
        for seed in range(seeds):
            test = {"loss": 2.0 + seed + shift * 2}
            cell = Cell("toy", method, 2, 1e-2, seed, True)
            results.add(cell, figures(1.0 + seed + shift + 0.01 * seed * (method == "ours"), test=test))
    rows = rows_of([TASK], ["ours", "half"], [2], 3, "validation", results)
    assert [row["method"] for row in rows] == ["lora", "ours"]  # a method of too few seeds has no row
    mean, low, high = rows[1]["difference"]
    assert mean == pytest.approx(-0.19) and low < mean < high < 0
    # The three differences are -.2, -.19, -.18: ± 4.303 · .01 / √3
    assert high - mean == pytest.approx(4.3027 * 0.01 / 3**0.5, rel=1e-3)
    text = markdown(rows, {"lora": "LoRA", "ours": "ours"})
    assert "**ahead**" in text and "-0.190" in text
    assert text.splitlines()[-1].endswith("| 4, 3 pairs |")  # LoRA has no fourth seed: it pairs with nothing
    assert rows[1]["losses"][3] == pytest.approx(3.83)
    on_test = rows_of([TASK], ["ours"], [2], 3, "test", results)
    assert on_test[1]["difference"][0] == pytest.approx(-0.4)


def test_pairs_of_other_lengths_are_refused():
    """Else a seed that is lacking shifts every pair after it."""
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])
    assert not paired([1.0], [2.0]).settled


def test_splits_that_share_a_row_are_refused(tmp_path):
    """A row of the test split in training is the oldest way to look good."""
    rows = [{"prompt": "a", "completion": "b"}]
    task = dataclasses.replace(TASK, rows=lambda sources: (rows, [], rows))
    with pytest.raises(ValueError, match="both train and test"):
        write_splits(task, Sources(ROOT, ROOT), tmp_path)


@pytest.mark.parametrize("method", ["lora", "lora_mlp", "para", "default", "peft_adalora"])
def test_a_cell_ends_within_one_percent_of_the_budget(tmp_path, method):
    """Equal parameters are the premise of every comparison; the real trainers run, on the model that ships here."""
    task = dataclasses.replace(TASKS["quickstart"], steps=10, batch=4)
    sources = Sources(ROOT / "shared-is-not-needed", ROOT)
    found = run_cell(Cell("quickstart", method, 2, 1e-2, 0, True), task, all_methods()[method], sources, tmp_path)
    assert 0.99 <= found["parameters"] / found["budget"] <= 1.01
    assert found["steps"] == 10
    assert 0 < found["validation"]["loss"] < 10 and 0 < found["test"]["loss"] < 10
    assert found["validation"]["count"] != found["test"]["count"]
    json.dumps(found)


@pytest.mark.full
def test_a_cell_that_fails_does_not_stop_the_others(tmp_path):
    """A night's table must not end with its first out-of-memory error, nor try it again for ever."""
    good, bad = (Cell("quickstart", name, 1, 1e-2, TUNING_SEED, False) for name in ("lora", "no such method"))
    results = Results(tmp_path / "results")

    def left():
        return [cell for cell in (bad, good) if cell not in results.of("quickstart")]

    sources = Sources(ROOT / "shared-is-not-needed", ROOT)
    assert run_side_by_side(left, results, sources, tmp_path / "work", 2) == [bad]
    assert left() == [bad] and results.of("quickstart")[good]["steps"] == TASKS["quickstart"].steps
    assert sorted(path.name for path in (tmp_path / "work").iterdir()) == ["job-0"]  # the other one never began


def test_a_curve_starts_at_the_run_itself_and_falls_off(tmp_path):
    """Else the sizes are another run's, or the cut adapter is not what is evaluated."""
    task = dataclasses.replace(TASKS["quickstart"], steps=10, batch=4, learning_rates=(1e-2,))
    sources, method = Sources(ROOT / "shared-is-not-needed", ROOT), all_methods()["default"]
    results = Results(tmp_path / "results")
    trial = Cell("quickstart", "default", 2, 1e-2, TUNING_SEED, False)
    with pytest.raises(UserError, match="not chosen"):
        run_curve(task, method, 2, TUNING_SEED, tmp_path / "results", sources, tmp_path)
    results.add(trial, run_cell(trial, task, method, sources, tmp_path))
    rows = run_curve(task, method, 2, TUNING_SEED, tmp_path / "results", sources, tmp_path)
    assert [row["share"] for row in rows] == list(SHARES) and curve_rows(tmp_path / "results") == rows
    assert rows[0]["loss"] == pytest.approx(results.of("quickstart")[trial]["validation"]["loss"], rel=1e-5)
    sizes = [row["parameters"] for row in rows]
    assert sizes == sorted(sizes, reverse=True) and sizes[-1] <= sizes[0] / 10 + 1
    assert rows[-1]["loss"] > rows[0]["loss"] + 0.01


def test_the_pages_show_what_the_committed_results_say():
    """Else a table is of other runs than the JSON beside it, or leaves out what did not go well."""
    methods = all_methods()
    rows, test_rows = (
        rows_of(list(TASKS.values()), list(methods), [1, 2, 8], 5, split, Results(RESULTS))
        for split in ("validation", "test")
    )
    assert len({(row["task"], row["target_r"]) for row in rows}) >= 6
    table, test_table = (
        markdown(found, {name: method.label for name, method in methods.items()}) for found in (rows, test_rows)
    )
    curve = curve_markdown(list(TASKS.values()), RESULTS)
    page = (ROOT / "docs" / "quality.md").read_text("utf-8")
    tables = page[page.index("\n### ") :]
    assert tables.strip() == f"{table}\n{curve}".strip()
    assert test_table in (ROOT / "docs" / "quality_test.md").read_text("utf-8")
    assert short_markdown(test_rows, "default") in (ROOT / "README.md").read_text("utf-8")


def test_a_table_is_against_the_method_that_is_asked_for():
    """Else what was found against ours is in no table that a command makes."""
    task, results = [TASKS["e2e"]], Results(RESULTS)
    against, usual = (
        {row["method"]: row for row in rows_of(task, ["lora", "default"], [1], 5, "validation", results, other)}
        for other in ("default", None)
    )
    assert against["lora"]["reference"] == "default" and "difference" not in against["default"]
    mean, low, high = usual["default"]["difference"]
    assert against["lora"]["difference"] == pytest.approx([-mean, -high, -low])


def test_rates_show_every_trial_and_mark_the_lowest(tmp_path):
    """Else the page on tuning shows a rate that was not the best, or a method whose trials are half done."""
    results = Results(tmp_path)
    tuned(results, "lora", (0.3, 0.1, 1e9))
    for cell in list(missing([TASK], ["ours"], [2], 1, results))[:2]:
        results.add(cell, figures(0.1))
    table = rates_markdown([TASK], ["lora", "ours"], [2], results, {"lora": "LoRA", "ours": "ours"})
    assert table.splitlines()[2:] == ["| toy, r = 2 | LoRA | 2 | 0.300 | **0.100** | diverged |"]


def test_the_tuning_page_shows_the_trials():
    """Else its table is of other runs than the JSON beside it."""
    labels = {name: method.label for name, method in all_methods().items()}
    shown = rates_markdown(list(TASKS.values()), ["lora", "default", "svd_start"], [1, 2, 8], Results(RESULTS), labels)
    assert len(shown.splitlines()) > 20 and shown.strip() in (ROOT / "docs" / "tuning.md").read_text("utf-8")
