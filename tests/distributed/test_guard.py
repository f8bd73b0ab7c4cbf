"""Ranks that must agree and do not: without these checks such a run would end as a worse model, silently."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "guard_worker.py"


CASES = {
    "config": "UserError: rank 1 has adalora.beta1 = 0.9, rank 0 has 0.85",
    "base": "UserError: rank 1 has the base model's fingerprint",
    "alone": "UserError: the optimizer does not hold 'blocks.0.up.lora_E'",
    "drift": "RanksDisagree: step 4: 'blocks.0.up.lora_B' on rank 1 differs from rank 0",
    "unwrapped": "UserError: ranks have different gradients of the adapters: nobody reduces them",
    "seeds": "UserError: 'blocks.0.up.lora_A' on rank 1 differs from rank 0 before the first step",
    "replicas": "UserError: 'blocks.0.up.lora_A' on rank 1 differs from rank 0 before the first step",
    "sharded-seeds": "UserError: 'blocks.0.up.lora_A' on rank 1 differs from rank 0 before the first step: its rows",
    "sharded-loaded": "UserError: 'blocks.0.up.lora_A' on rank 1 differs from rank 0 before the first step: its rows",
    "late": "Unsupported: 'blocks.0.up.lora_A' is a plain tensor in a sharded model",
    "head": "Unsupported: 'head.weight' is trained but not sharded",
    "fsdp1": "Unsupported: FullyShardedDataParallel (FSDP1) is not supported",
    "then-sharded": "UserError: 'blocks.0.up.lora_A' is not the parameter it was at attach",
    "then-initialized": "UserError: 'blocks.0.up.lora_A' is not the parameter it was at attach",
    "join": "Unsupported: DistributedDataParallel.join() (accelerate's join_uneven_inputs) is not supported",
    "join-inner": "Unsupported: DistributedDataParallel.join() (accelerate's join_uneven_inputs) is not supported",
    "moved": "UserError: 'blocks.0.up.lora_A' was given other memory after attach",
}

AGREE = ["none", "sharded", "sharded-same"]


@pytest.fixture(scope="module")
def messages(deepspeed_ops):
    """What every case ended with on either rank, in one start."""
    ranks = run_ranks(WORKER, 2, [*CASES, *AGREE])
    return {case: [rank[case] for rank in ranks] for case in (*CASES, *AGREE)}


@pytest.mark.parametrize("case", CASES)
def test_ranks_that_disagree_are_told_what_and_where(messages, case):
    """A message without parameter, rank or step would leave the user searching a cluster."""
    assert [message[: len(CASES[case])] for message in messages[case]] == [CASES[case]] * 2


@pytest.mark.parametrize("case", AGREE)
def test_ranks_that_agree_pass(messages, case):
    """A guard that always fires would be switched off; drawn from other seeds and then loaded alike is alike."""
    assert messages[case] == ["", ""]
