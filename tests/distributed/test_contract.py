"""Every engine over the vendor's options that move memory: each cell equals one process or is refused by its key.

What a cell checks stands in workers/contract.py: masks, the values that the forward computes with, λ outside the mask,
files saved with and without an allocator and after an evaluation, what a checkpoint would hold, and the guard.
"""

from pathlib import Path

import pytest

from tests.distributed.contract_cells import CELLS, cells_for
from tests.distributed.launcher import RankFailure, run_ranks
from tests.distributed.workers import contract_mutants

WORKER = Path(contract_mutants.__file__).with_name("contract.py")
THREE_RANKS = {"zero2": ["round-robin"], "zero3": ["sub-groups"], "fsdp2": ["nested"]}
MUTANTS = [
    "zero2:plain+shifted",
    "zero3:plain+shifted",
    "fsdp2:plain+shifted",
    "zero2:plain+shifted-at-attach",
    "zero2:plain+stale",
    "zero3:plain+stale",
    "fsdp2:plain+stale",
    "ddp:plain+stale",
    "zero2:plain+other-mask",
    "fsdp2:plain+other-mask",
    "zero2:round-robin+vendor-places",
    "zero2:round-robin+vendor-places-and-probe",
]
HOST = [
    "zero1:offload",
    "zero2:bf16-offload",
    "zero3:offload",
    "fsdp2:offload",
    "fsdp2:replicated-offload",
]
"""Cells whose pieces lie on the CPU while the engine's device is another."""


@pytest.fixture(scope="module")
def outcomes(deepspeed_ops):
    """Run an engine's cells in one start, the first time one of them is asked for; return a cell's outcomes by rank."""
    starts = {}

    def outcome(engine, ranks, names, name):
        key = engine, ranks, tuple(names)
        if key not in starts:
            failure = ""
            try:
                outputs = run_ranks(WORKER, ranks, [engine, *names], timeout=60 + 10 * len(names))
            except RankFailure as error:
                outputs, failure = error.ranks, str(error)
            starts[key] = [output.values for output in outputs], failure
        values, failure = starts[key]
        if not all(name in rank for rank in values):
            pytest.fail(f"{engine} {name} did not end on every rank: {[rank.get(name) for rank in values]}\n{failure}")
        return [rank[name] for rank in values]

    return outcome


def assert_equal_or_refused(found, key):
    for outcome in found:
        if key is not None and outcome["verdict"] == "refused":
            assert key in outcome["reason"], outcome["reason"]
        else:
            assert outcome["verdict"] == "equal", outcome


def cells(ranks):
    return [(engine, name) for engine in CELLS for name in cells_for(engine, ranks)]


def names_on_four(engine):
    return [name for name in cells_for(engine, 4) if 2 not in CELLS[engine][name].ranks or "hpz" in name]


@pytest.mark.parametrize(("engine", "name"), cells(2))
def test_a_cell_equals_one_process_or_is_refused_by_its_key(outcomes, engine, name):
    """Else an option of the vendor's trains or saves something else without a word."""
    assert_equal_or_refused(outcomes(engine, 2, cells_for(engine, 2), name), CELLS[engine][name].key)


@pytest.mark.parametrize(("engine", "name"), [(e, n) for e, names in THREE_RANKS.items() for n in names])
def test_a_cell_on_three_ranks(outcomes, engine, name):
    """Else pieces are right only where two ranks share evenly."""
    assert_equal_or_refused(outcomes(engine, 3, THREE_RANKS[engine], name), CELLS[engine][name].key)


@pytest.mark.full
@pytest.mark.parametrize(("engine", "name"), cells(3))
def test_every_cell_on_three_ranks(outcomes, engine, name):
    """The whole suite with rows that three ranks split."""
    assert_equal_or_refused(outcomes(engine, 3, cells_for(engine, 3), name), CELLS[engine][name].key)


@pytest.mark.full
@pytest.mark.parametrize(("engine", "name"), [(e, name) for e in CELLS for name in names_on_four(e)])
def test_cells_that_need_four_ranks(outcomes, engine, name):
    """Else hybrid meshes and groups inside groups are right only in their trivial shapes."""
    assert_equal_or_refused(outcomes(engine, 4, names_on_four(engine), name), CELLS[engine][name].key)


def started_together(cell, selection):
    engine, _, name = cell.partition(":")
    return engine, [other.partition(":")[2] for other in selection if other.startswith(engine + ":")], name


@pytest.mark.parametrize("cell", MUTANTS)
def test_a_mutant_is_refused(outcomes, cell):
    """Else the suite would pass whatever the engines do."""
    engine, _, name = cell.partition(":")
    found = outcomes(engine, 2, [name], name)  # a start of its own: ranks need not end alike
    assert "equal" not in {outcome["verdict"] for outcome in found}, found


@pytest.mark.parametrize("cell", HOST)
def test_no_cpu_tensor_is_sent_where_the_process_group_takes_none(outcomes, cell):
    """Else a run with CPU offload ends at the first guard on GPUs: NCCL has no backend for CPU tensors."""
    engine, names, name = started_together(cell, [f"{other}+no-cpu-backend" for other in HOST])
    assert_equal_or_refused(outcomes(engine, 2, names, f"{name}+no-cpu-backend"), None)
