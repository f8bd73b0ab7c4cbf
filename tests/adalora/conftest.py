"""Inputs every test of the method shares."""

import pytest
import torch

from tests.toy import Toy


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (8, 12), generator=generator) for _ in range(60)]
