"""The result that every launch must reach: the small run in one process."""

import pytest

from tests.cluster.small_run import train_alone


@pytest.fixture(scope="session")
def one_process_result(tmp_path_factory):
    return train_alone(tmp_path_factory.mktemp("alone") / "out")
