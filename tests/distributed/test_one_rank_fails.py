"""A file damaged on one machine ends all ranks with its name, not one rank and, half an hour later, the others."""

import shutil
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.launcher import run_ranks
from tests.distributed.workers import one_rank_fails

WORKER = Path(one_rank_fails.__file__)
TIMEOUT = 100  # the group's own is 30 minutes


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=128, intermediate_size=192, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("when", "engine"), [("begin", "fsdp2"), ("load", "fsdp2"), ("load", "zero3"), ("resume", "fsdp2")]
)
def test_every_rank_says_which_file_of_which_rank_is_damaged(tmp_path, llama, request, when, engine):
    """Else the other ranks wait in a collective for the one that failed, until the group's timeout."""
    if engine == "zero3":
        request.getfixturevalue("deepspeed_ops")
    for rank in (0, 1):
        shutil.copytree(llama, tmp_path / f"rank{rank}" / "model")
    outputs = run_ranks(WORKER, 2, [when, engine, tmp_path], timeout=TIMEOUT)
    broken = one_rank_fails.BROKEN.get(engine, 1)
    for output in outputs:
        assert f"(rank {broken})" in output["said"]
        assert str(tmp_path / f"rank{broken}") in output["said"]
        assert "damaged or truncated" in output["said"] or "cannot be read" in output["said"]


def test_a_disk_that_does_not_take_the_adapter_is_said_on_every_rank(tmp_path):
    """Rank 0 alone writes; the others would go on to the next collective and wait there."""
    outputs = run_ranks(WORKER, 2, ["save", "ddp", tmp_path], timeout=TIMEOUT)
    for output in outputs:
        assert str(tmp_path / "run") in output["said"] and "File too large" in output["said"]
    assert list((tmp_path / "run").iterdir()) == []
