"""launch/skypilot.yaml: what it runs is there, and SkyPilot itself takes it, where it is installed."""

import copy

import pytest
import yaml

from adalora_scale.config import load_config
from tests.conftest import ROOT
from tests.test_readme import paths_in

FILE = ROOT / "launch" / "skypilot.yaml"
TASK = yaml.safe_load(FILE.read_text(encoding="utf-8"))


def test_what_it_names_is_there():
    """A script or recipe that was renamed would be missed on a machine that is paid for."""
    named = paths_in(TASK["setup"]) | paths_in(TASK["run"]) | set(TASK["envs"].values())
    assert {"launch/setup.sh", "launch/torchrun.sh", "configs/recipes/gsm8k_llama3_8b.yaml"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []
    override = TASK["run"].split()[-1]
    assert load_config(ROOT / TASK["envs"]["CONFIG"], [override]).training["resume_from_checkpoint"] == "auto"


def test_skypilot_takes_it():
    """Else `sky launch` refuses it."""
    sky = pytest.importorskip("sky", reason="pip install skypilot")
    task = sky.Task.from_yaml_config(copy.deepcopy(TASK), secrets_overrides=[("HF_TOKEN", "")])
    assert task.num_nodes == 1 and {dict(r.accelerators)["H100"] for r in task.resources} == {8}
    with pytest.raises(ValueError, match="runs"):
        sky.Task.from_yaml_config(copy.deepcopy(TASK) | {"runs": "x"})
