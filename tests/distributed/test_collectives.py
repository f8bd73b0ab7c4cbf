"""What the hooks cost in every step, counted at torch's dispatcher on real ranks, between the engine's own work."""

from pathlib import Path

import pytest

from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "collectives.py"
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
PRESETS = ("default", "paper")
CELLS = [f"{engine}:{layers}:{preset}" for preset in PRESETS for engine in ENGINES for layers in (2, 8)]
ONE_CALL = [f"zero3+whole:8:{preset}" for preset in PRESETS]
"""ZeRO-3 with sub-groups of DeepSpeed's own size: one call of the optimizer for each of the two parameter groups."""
LIMITS = {"default": 40, "paper": 120}
"""Operations that the hooks add to a step, views included."""
AT_AN_ALLOCATION = 300
A_CALL = 40
"""What each further call of the optimizer in a step may add; ZeRO-3 has six below, where it is cut small."""


@pytest.fixture(scope="module")
def outputs(deepspeed_ops):
    """Three ranks split rows, ZeRO-2 has two groups, ZeRO-3 several sub-groups."""
    return run_ranks(WORKER, 3, [*CELLS, *ONE_CALL], timeout=300)


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
def test_updates_are_computed_in_one_function_with_the_base_s_product(outputs, engine):
    """An engine's hook, or another kind of weight, would send every layer the longer way, and nobody would notice."""
    for rank in outputs:
        in_one_function, plain = rank[f"{engine}:8:default"]["forwards"]
        if engine == "zero3":  # brings a layer's weight in a hook on that layer
            in_one_function, plain = plain, in_one_function
        assert in_one_function >= 7 * 8 and plain == 0


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


def require_flat(few, many, preset, slack=15):
    """Operations and reads of steps of a small and of a larger model, on one rank.

    Where the small model's pieces are of fewer shapes, or ranks' pieces end inside a row, the larger one has up to
    `slack` operations more a call of the optimizer; one for each of the 126 tensors added is above it.
    """
    for seen in (few, many):
        further = A_CALL * max(0, seen["calls"] - 2)
        steps = zip(seen["operations"], seen["reads"], seen["allocations"], strict=True)
        for operations, reads, allocation in [*steps][1:]:  # the first has the optimizer's state to find
            assert 5 < operations <= (AT_AN_ALLOCATION if allocation else LIMITS[preset]) + further, seen
            assert reads <= 1, seen
    if few["calls"] == many["calls"]:
        for small, large in [*zip(few["operations"], many["operations"], strict=True)][1:]:
            assert large <= small * 1.05 + slack * few["calls"], (few["operations"], many["operations"])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("engine", ENGINES)
def test_operations_of_a_step_do_not_grow_with_layers(outputs, engine, preset):
    """Else a large model pays tens of thousands of launches a step, as PEFT's AdaLoRA does."""
    for rank in outputs:
        require_flat(rank[f"{engine}:2:{preset}"], rank[f"{engine}:8:{preset}"], preset)


@pytest.mark.parametrize("preset", PRESETS)
def test_operations_under_zero3_as_deepspeed_cuts_it(outputs, preset):
    """Else the limits hold where nobody trains: what the sub-groups above add is counted separately."""
    for rank in outputs:
        seen = rank[f"zero3+whole:8:{preset}"]
        assert seen["calls"] <= 2
        require_flat(seen, seen, preset)


@pytest.mark.full
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero2", "zero3+whole"])
def test_operations_at_28_280_and_560_matrices(deepspeed_ops, engine, preset):
    """The promise at the sizes that it names."""
    cells = [f"{engine}:{layers}:{preset}" for layers in (4, 40, 80)]
    for rank in run_ranks(WORKER, 2, cells, timeout=560):
        for cell in cells:
            require_flat(rank[cells[0]], rank[cell], preset, slack=3)
