"""What the tests of runs share."""

import shutil

import pytest
import transformers

from adalora_scale.checkpoint.format import checkpoints
from adalora_scale.placing import streaming
from adalora_scale.training.run import train
from tests.training.short_run import config


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """The uninterrupted run's folder, with a checkpoint at every second step."""
    folder = tmp_path_factory.mktemp("straight") / "out"
    train(config(folder))
    return folder


@pytest.fixture
def crashed(straight, tmp_path):
    """Copy the run as a crash after `step` would have left it: later checkpoints and the end are missing."""

    def copy(step):
        folder = tmp_path / "out"
        shutil.copytree(straight, folder)
        for path in checkpoints(folder):
            if int(path.name.removeprefix("checkpoint-")) > step:
                shutil.rmtree(path)
        for name in ("adapter_config.json", "adapter_model.safetensors", "run.json"):
            (folder / name).unlink()
        return folder

    return copy


@pytest.fixture
def model_stays_on_disk(monkeypatch):
    """A wire across both doors to a base's weights, past every `except Exception`: a mistake that can be seen without
    them must be."""

    def trip(*args, **kwargs):
        pytest.fail("the model was loaded")

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", trip)
    monkeypatch.setattr(streaming, "begin", trip)
