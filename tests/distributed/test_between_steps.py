"""What a user does between two steps: every rank goes on rightly, or all say the same."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "between_steps.py"
HEAD = ["head.bias", "head.weight"]
CASES = [
    "frozen_head:ddp", "frozen_head:fsdp2", "frozen_head:zero2", "written_back:ddp", "written_back:fsdp2",
    "written_back:zero2", "loaded_in_place:ddp", "loaded_in_place:zero2", "other_step_counts:zero2",
    "one_rank_cannot_draw:fsdp2", "drifted_head:ddp", "drifted_head:hsdp", "drifted_head:zero2",
]  # fmt: skip


@pytest.fixture(scope="module")
def outcomes(deepspeed_ops):
    ranks = run_ranks(WORKER, 2, CASES, timeout=120)
    return {case: [rank[case] for rank in ranks] for case in CASES}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_a_module_frozen_after_attach_stays_in_checkpoints(outcomes, engine):
    """Else a run that trains in stages ends with a KeyError at its next checkpoint."""
    assert outcomes[f"frozen_head:{engine}"] == [HEAD, HEAD]


def test_zero_refuses_a_frozen_module_as_it_refuses_a_frozen_adapter(outcomes):
    """Else weight decay and moments go on moving what the user froze."""
    expected = "Unsupported: 'head.weight' was frozen (requires_grad=False) after attach"
    assert [message[: len(expected)] for message in outcomes["frozen_head:zero2"]] == [expected] * 2


@pytest.mark.parametrize("engine", ["ddp", "hsdp", "zero2"])
def test_the_guard_compares_what_is_trained_beside_the_adapters(outcomes, engine):
    """Else replicas of a head drift apart until the end, and rank 0's is saved."""
    expected = "RanksDisagree: step 2: 'head.bias' on rank 1 differs from rank 0"
    assert [message[: len(expected)] for message in outcomes[f"drifted_head:{engine}"]] == [expected] * 2


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2"])
def test_the_forward_computes_with_what_is_written_back(outcomes, engine):
    """Else the best checkpoint's head is written and the final evaluation still sees the last one's."""
    for distance in outcomes[f"written_back:{engine}"]:
        assert distance < 1e-6


def test_weights_loaded_into_a_live_model_count_or_are_refused(outcomes):
    """Else DeepSpeed's masters undo them at the next step, and nothing says so."""
    assert outcomes["loaded_in_place:ddp"] == [True, True]
    for message in outcomes["loaded_in_place:zero2"]:
        assert "was changed after attach (by load_state_dict" in message


@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("other_step_counts:zero2", "Unsupported: parameters of one flat partition took different numbers of steps"),
        ("one_rank_cannot_draw:fsdp2", "UserError: the earlier adapter is gone (rank 1)"),
    ],
)
def test_what_one_rank_cannot_do_ends_all(outcomes, case, said):
    """Else the others wait for it in their next collective."""
    assert [message[: len(said)] for message in outcomes[case]] == [said] * 2
