"""What a launcher's variables say: a place, nothing, or a refusal in one line that names the variable."""

import itertools
import json
import os
import subprocess
import sys

import pytest

from adalora_scale.cluster.place import Place, launched
from adalora_scale.errors import UserError, run_reporting_errors
from tests.conftest import ROOT

WHOLE = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
NAMES = (*WHOLE, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


@pytest.fixture
def variables(monkeypatch):
    def put(**values):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize("alone", [{}, {"WORLD_SIZE": "1"}, {"LOCAL_RANK": "-1"}, {"PMI_SIZE": "1"}])
def test_a_process_started_alone(variables, alone):
    """Else whoever has a harmless variable in a shell cannot start."""
    variables(**alone)
    assert launched() is None


@pytest.mark.parametrize(
    "local, size", [({"LOCAL_WORLD_SIZE": "4"}, 4), ({"LOCAL_SIZE": "4"}, 4), ({"LOCAL_WORLD_SIZE": ""}, 2), ({}, 2)]
)
def test_a_rank_of_torchrun_or_deepspeed(variables, local, size):
    """deepspeed's launcher says LOCAL_SIZE, and older ones nothing."""
    variables(**WHOLE | local)
    assert launched() == Place(rank=3, world_size=8, local_rank=1, local_world_size=size)


@pytest.mark.parametrize(
    "name, value",
    [
        *itertools.product(["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"], ["", "x", "1.0", "-1"]),
        ("LOCAL_WORLD_SIZE", "x"),
        ("LOCAL_SIZE", "x"),
    ],
)
def test_a_value_that_is_no_number_is_named(variables, capsys, name, value):
    """The line is said by a process that does not know its own rank."""
    variables(**WHOLE | {name: value})
    with pytest.raises(UserError, match=f"^{name}={value} is no number; start with torchrun"):
        launched()
    if name == "RANK":
        assert run_reporting_errors(lambda: launched() and 0) == 2
        assert capsys.readouterr().err.startswith(f"error: RANK={value} is no number; ")


@pytest.mark.parametrize("name", ["WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_a_variable_that_is_missing_is_named(variables, name):
    """torch words it as a rendezvous that failed, after the libraries were loaded."""
    variables(**{key: value for key, value in WHOLE.items() if key != name})
    with pytest.raises(UserError, match=f"^{name} is not set, but RANK=3 is; "):
        launched()


@pytest.mark.parametrize(
    "values, said",
    [
        ({"RANK": "8"}, "RANK=8 is not below WORLD_SIZE=8; "),
        ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK=2 is not below LOCAL_WORLD_SIZE=2; "),
        ({"LOCAL_RANK": "2", "LOCAL_SIZE": "2"}, "LOCAL_RANK=2 is not below LOCAL_SIZE=2; "),
    ],
)
def test_a_rank_that_does_not_exist_is_refused(variables, values, said):
    """Else it waits for the others until torch's timeout of half an hour."""
    variables(**WHOLE | values)
    with pytest.raises(UserError, match=f"^{said}"):
        launched()


@pytest.mark.parametrize(
    "name, value",
    [("WORLD_SIZE", "2"), ("WORLD_SIZE", ""), ("LOCAL_RANK", "0"), ("OMPI_COMM_WORLD_SIZE", "2"), ("PMI_SIZE", "4")],
)
def test_ranks_that_would_train_alone_are_refused(variables, name, value):
    """Else each process of an mpirun trains a whole run of its own, into one folder."""
    variables(**{name: value})
    with pytest.raises(UserError, match=f"^{name}={value} is set, but RANK is not; "):
        launched()


def test_the_command_says_so_in_one_line():
    """The way to the message leads through code that asks for the rank."""
    done = started("-m", "adalora_scale", "train")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: RANK=x is no number; ") and len(done.stderr.splitlines()) == 1


def test_a_rank_that_keeps_a_log_says_so_too(tmp_path):
    """Its log is opened before anything else, under the rank's name."""
    done = started("launch/train.py", ADALORA_LOG_DIR=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stdout + done.stderr
    (status,) = tmp_path.glob("*.status.json")
    assert json.loads(status.read_text())["failure"]["message"].startswith("error: RANK=x is no number; ")
    assert "\nerror: RANK=x is no number; " in done.stdout  # a log and the console share one stream


def started(*command, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | WHOLE | {"RANK": "x"}
    return subprocess.run(
        [sys.executable, *command, "--config", "configs/recipes/quickstart.yaml"],
        env=environment | variables, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
