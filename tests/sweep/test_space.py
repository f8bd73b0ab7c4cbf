"""What is varied: values as they were written, and one line for what is wrong, before anything runs."""

import pytest

from adalora_scale.cli import main
from adalora_scale.sweep.report import at_the_edge, table
from adalora_scale.sweep.space import Choices, around, choices, grid, number_range
from adalora_scale.sweep.trial import Outcome, Trial

RECIPE = "configs/recipes/quickstart.yaml"


def test_values_stay_as_they_were_written():
    """1e-4 through YAML would be text, a list would be torn at its commas, and 8 would become 8.0."""
    assert choices("training.learning_rate=1e-4, 2.0e-4").values == ("1e-4", "2.0e-4")
    assert choices("adalora.target_modules=[q_proj,v_proj],all-linear").values == ("[q_proj,v_proj]", "all-linear")
    assert choices("adalora.target_modules='.*q_proj',\"a,b\"").values == ("'.*q_proj'", '"a,b"')
    both = list(grid([choices("a.x=1,2"), choices("a.y=3,4")]))
    assert both == [(("a.x", a), ("a.y", b)) for a in "12" for b in "34"]
    assert around("training.learning_rate", 2e-4).values == ("5e-05", "0.0001", "0.0002", "0.0004", "0.0008")


@pytest.mark.parametrize(
    "text, whole, logarithmic",
    [
        ("a.b=1e-5..1e-3", False, True),
        ("a.b=4..16", True, False),
        ("a.b=0..0.2", False, False),
        ("a.b=1.0..8.0", False, True),
    ],
)
def test_a_range_is_whole_logarithmic_or_even(text, whole, logarithmic):
    """A learning rate drawn evenly from 1e-5..1e-3 is above 1e-4 nine times of ten."""
    found = number_range(text)
    assert (found.whole, found.logarithmic) == (whole, logarithmic) and found.low < found.high


def test_trials_of_other_values_have_other_folders():
    """Two trials in one folder would be one trial's figures twice."""
    names = {
        Trial(settings, seed).name
        for seed in (0, 1)
        for settings in ((("a.x", "1"),), (("b.x", "1"),), (("a.x", "one"),), (("a.x", "[1]"),), ())
    }
    assert Trial((("a.x", "1e-2"), ("a.y", "2")), 0) == Trial((("a.y", "2.0"), ("a.x", "0.01")), 0)
    assert len(names) == 10 and all(name.isascii() and not set(name) & set("/=, []") for name in names)


def test_a_diverged_trial_is_last_and_the_edge_is_named():
    """NaN compares as neither less nor more: the winner would depend on the order."""
    rates = choices("training.learning_rate=1,2,3")
    results = {
        Trial(settings, 0): Outcome("done", value)
        for settings, value in zip(grid([rates]), (float("nan"), 2.0, 1.0), strict=True)
    }
    lines = table(results, {}, "eval_loss", "min").splitlines()[2:]
    assert [line.split("|")[1].strip() for line in lines] == ["3", "2", "1"] and "diverged" in lines[-1]
    assert "largest tried" in at_the_edge(Trial((("training.learning_rate", "3"),), 0), [rates], results)[0]
    assert at_the_edge(Trial((("training.learning_rate", "2"),), 0), [rates], results) == []
    fewer = [choices("training.learning_rate=1,2")]  # this call's; an earlier one tried 3
    assert at_the_edge(Trial((("training.learning_rate", "2"),), 0), fewer, results) == []
    again = {Trial((), seed, again=True): Outcome("done", value) for seed, value in enumerate((1.0, 2.0, 3.0))}
    assert "2.0000 ± 1.0000" in table(results, again, "eval_loss", "min")
    words = Choices("task", ("a", "b", "c"))
    assert (
        at_the_edge(
            Trial((("task", "a"),), 0), [words], {Trial((("task", v),), 0): Outcome("done", 1.0) for v in "abc"}
        )
        == []
    )


@pytest.mark.parametrize(
    "words, says",
    [
        (["--grid", "learning_rate=1"], "not of the form KEY=V1,V2"),
        (["--grid", "training.learning_rate=1e-3,0.001"], "a value twice"),
        (["--grid", "training.learning_rte=1e-3"], "learning_rate"),
        (["--grid", "adalora.target_r=0,4"], "target_r"),
        (["--grid", "adalora.target_r=4", "--grid", "adalora.target_r=8"], "varied twice"),
        (["--grid", "training.seed=1,2"], "--seeds N"),
        (["--grid", "training.learning_rate=[1"], "no YAML"),
        (["--range", "training.learning_rate=1e-3..1e-2"], "--trials N"),
        (["--range", "training.learning_rate=1e-2..1e-3", "--trials", "2"], "below HIGH"),
        (["--range", "training.learning_rate=1e-2", "--trials", "2"], "LOW..HIGH"),
        (["--range", "adalora.target_r=0..4", "--trials", "2"], "target_r"),
        (["--trials", "0"], "at least 1"),
        (["--sbatch", "--nodes=1", "--jobs", "2"], "cannot go with --jobs"),
        (["data.eval=null"], "data.eval_fraction"),
        (["training.learning_rate=abc"], "learning_rate"),
        (["training.seed=abc"], "seed"),
        (["--launcher", "nosuch-launcher"], "not a command"),
        (["--launcher", "torchrun '"], "No closing quotation"),
        (["--launcher", "deepspeed --num_gpus 4", "--jobs", "2"], "--jobs cannot go with deepspeed"),
        (["--resubmit"], "--sbatch"),
        (["training.output_store=file:///mnt/store/run"], "training.output_store is one run's folder"),
    ],
)
def test_wrong_use_is_one_line_and_writes_nothing(tmp_path, capsys, monkeypatch, words, says):
    """A sweep that dies at its fortieth trial of a word misspelt cost a night."""
    monkeypatch.chdir(__file__.split("/tests/")[0])
    words = [f"--sbatch={words[1]}", *words[2:]] if words[0] == "--sbatch" else words
    assert main(["sweep", "--config", RECIPE, "--output", str(tmp_path / "sweep"), *words]) == 2
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1
    assert not (tmp_path / "sweep").exists()


def test_a_folder_with_other_files_is_refused(tmp_path, capsys, monkeypatch):
    """Else trials are strewn into somebody's run."""
    monkeypatch.chdir(__file__.split("/tests/")[0])
    (tmp_path / "run.json").write_text("{}")
    assert main(["sweep", "--config", RECIPE, "--output", str(tmp_path)]) == 2
    assert "other files" in capsys.readouterr().err
