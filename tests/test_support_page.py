"""docs/support.md says of every combination what the tests' marks say; tests/support makes it."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from tests.support.collecting import cells_of
from tests.support.page import page

TRAINING = {"task": "causal_lm", "engine": "{engine}", "base": "float32"}


def items(*tests):
    """What pytest collects, as far as the marks are read: (name, parameters, marks)."""

    class Item(SimpleNamespace):
        def iter_markers(self, kind):
            return [mark for mark in self.marks if mark.name == kind]

        def get_closest_marker(self, kind):
            return next(iter(self.iter_markers(kind)), None)

    return [
        Item(nodeid=f"tests/test_x.py::{name}[{given}]", callspec=SimpleNamespace(params=given), marks=marks)
        for name, given, marks in tests
    ]


def shows(table="training", **axes):
    return pytest.mark.shows(table, **axes).mark


def test_the_page_is_what_the_tests_show():
    """Else it promises what a test no longer does; `python -m tests.support` makes it again."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}\nrun: python -m tests.support"


def test_cells_say_what_runs_every_day_what_seldom_and_what_is_refused():
    """Else a matrix of `--full` looks like what every change is tested with."""
    refuses = pytest.mark.refuses("training", **TRAINING, because="no room").mark
    named = shows(task="causal_lm", engine=lambda given: given.get("other"), base=("bfloat16", "float32"))
    found = cells_of(
        items(
            ("test_a", {"engine": "ddp"}, [shows(**TRAINING)]),
            ("test_a", {"engine": "zero1"}, [shows(**TRAINING), pytest.mark.full.mark]),
            ("test_b", {"engine": "zero1"}, [shows(**TRAINING), pytest.mark.full.mark]),
            ("test_c", {"engine": "zero2"}, [refuses]),
            ("test_d", {"other": "fsdp2"}, [named]),
            ("test_d", {}, [named]),
        )
    )
    text = page(found)
    assert "\n| ddp | shown | untested | untested |" in text
    assert "\n| zero1 | `--full` | untested |" in text
    assert "\n| zero2 | refused (1) | untested |" in text and "\n1. no room\n" in text
    assert "\n| fsdp2 | shown | shown | untested |" in text
    assert "- `tests/test_x.py::test_a` `--full`: causal_lm · zero1 · float32\n" in text
    assert "- `tests/test_x.py::test_d`: causal_lm · fsdp2 · float32, bfloat16\n" in text


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ([shows(**TRAINING | {"engine": "zero9"})], "engine is 'zero9', not one of one process"),
        ([shows(**TRAINING | {"rank": "2"})], "gives task, engine, base, rank"),
        ([shows("trainings", **TRAINING)], "trainings"),
        ([shows(**TRAINING | {"base": "{bits}"})], "bits"),
        ([shows(**TRAINING), pytest.mark.refuses("training", **TRAINING, because="no").mark], "refused by"),
    ],
)
def test_a_mark_that_is_no_cell_is_an_error(marks, said):
    """Else a misspelt engine is a cell that nobody sees."""
    with pytest.raises(ValueError, match=said):
        cells_of(items(("test_a", {"engine": "ddp"}, marks)))
