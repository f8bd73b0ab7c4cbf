"""Adapters that a forward does not use train under DDP as on one process."""

from pathlib import Path

import torch

from tests.distributed.launcher import run_ranks
from tests.distributed.workers import unused


def test_two_ranks_are_one_process_whatever_the_forward_returns():
    """Else a multimodal model on rows of text ends in a traceback, or ranks train different adapters."""
    ranks = run_ranks(Path(unused.__file__), 2, timeout=200)
    for form in unused.FORMS:
        wanted = unused.train(form)
        for rank in ranks:
            assert rank[form].keys() == wanted.keys()
            for name, values in wanted.items():
                torch.testing.assert_close(torch.tensor(rank[form][name]), torch.tensor(values), rtol=1e-4, atol=1e-6)
