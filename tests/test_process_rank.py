"""Which process this is, whatever became of the environment since the start."""

import ast
import os

import datasets
import pytest

from adalora_scale.process_rank import process_count, process_rank
from tests.conftest import ROOT

REPLACED = {"os.environ", "sys.stdout", "sys.stderr", "sys.argv", "sys.modules", "sys.path"}
"""What libraries and tests put another object into the place of."""


def remembered(source):
    """Find the default values that keep, from a module's import on, what may be replaced."""
    taken = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.arguments))
    defaults = [default for node in taken for default in (*node.defaults, *node.kw_defaults) if default is not None]
    return [ast.unparse(default) for default in defaults if ast.unparse(default) in REPLACED]


def test_the_variables_are_read_as_they_are_now(monkeypatch):
    """datasets puts a copy in os.environ's place when it works with processes; what was set later was not seen."""
    monkeypatch.setattr(os, "environ", os.environ)  # put back at the end
    before = os.environ
    datasets.Dataset.from_dict({"n": [1, 2]}).map(lambda row: row, num_proc=2)
    assert os.environ is not before, "datasets leaves the environment in its place now: this test shows nothing"
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert (process_rank(), process_count()) == (3, 4)


@pytest.mark.parametrize("value", ["", "x", "-1", "1.0"])
def test_what_is_no_number_is_alone(monkeypatch, value):
    """Else the error's own printing ends in a traceback before the launcher's variable is named."""
    monkeypatch.setenv("RANK", value)
    monkeypatch.setenv("WORLD_SIZE", value)
    assert (process_rank(), process_count()) == (0, 1)


def test_no_default_remembers_what_may_be_replaced():
    """The kind: an environment, a stream or a path of the time of import."""
    folders = ("adalora_scale", "launch", "benchmarks")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    assert {str(path): found for path in files if (found := remembered(path.read_text()))} == {}
    assert remembered("def f(a=os.environ, *, b=sys.stderr, c=None): pass") == ["os.environ", "sys.stderr"]
