"""What the hooks cost in every step, counted at torch's dispatcher on real ranks, between the engine's own work."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "collectives.py"
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
PRESETS = ("default", "paper")
CELLS = [f"{engine}:{layers}:{preset}" for preset in PRESETS for engine in ENGINES for layers in (2, 8)]


@pytest.fixture(scope="module")
def outputs(deepspeed_ops):
    """Three ranks split rows, ZeRO-2 has two groups, ZeRO-3 several sub-groups."""
    return run_ranks(WORKER, 3, CELLS, timeout=300)


def test_the_counter_sees_collectives(outputs):
    """Else the counts below are zero whatever the hooks do."""
    assert [rank["probe"] for rank in outputs] == [[2, 8]] * 3


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("engine", ENGINES)
def test_at_most_one_collective_a_step_and_three_at_an_allocation(outputs, engine, preset):
    """Else the method costs a latency per group or per layer."""
    for rank in outputs:
        seen = rank[f"{engine}:8:{preset}"]
        assert any(seen["allocations"]) and not all(seen["allocations"])
        for count, allocation in zip(seen["collectives"], seen["allocations"], strict=True):
            assert count <= (3 if allocation else 1), seen
        if engine != "ddp":
            assert max(seen["collectives"]) >= 2


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_of_the_default_sends_three_numbers_at_most_whatever_the_model(outputs, engine):
    """Else 560 matrices cost an exchange that grows with them, as the penalty's Gram matrices do."""
    for rank in outputs:
        cells = ("2:default", "8:default", "2:paper", "8:paper")
        sent = {cell: bytes_of_plain_steps(rank[f"{engine}:{cell}"]) for cell in cells}
        assert sent["2:default"] == sent["8:default"] and max(sent["8:default"]) <= 12
        if engine != "ddp":  # which has whole Gram matrices on every rank
            assert min(sent["8:default"]) > 0 and min(sent["8:paper"]) > 3 * min(sent["2:paper"])


def bytes_of_plain_steps(seen):
    return {size for size, allocation in zip(seen["bytes"], seen["allocations"], strict=True) if not allocation}


ADDED_TENSORS = (8 - 2) * 7 * 3  # layers, matrices a layer, adapter tensors a matrix


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("engine", ENGINES)
def test_kernels_of_a_step_do_not_grow_with_layers(outputs, engine, preset):
    """Else a large model pays tens of thousands of launches a step, as PEFT's AdaLoRA does."""
    for rank in outputs:
        few, many = rank[f"{engine}:2:{preset}"], rank[f"{engine}:8:{preset}"]
        assert few["calls"] > 0 and many["calls"] > 0
        for step in range(1, len(few["kernels"])):  # the first one has the optimizer's state to find
            if not few["allocations"][step]:
                # Whether ranks' pieces meet inside a row, and how many shapes a rank holds, depends on the layout and
                # costs a handful either way; one kernel for every second added tensor would already be growth.
                expected = few["kernels"][step] * max(1, many["calls"] / few["calls"])
                assert 0 < many["kernels"][step] <= expected + ADDED_TENSORS // 2, step
