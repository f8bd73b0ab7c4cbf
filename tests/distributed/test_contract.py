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
OFTEN_ON_THREE_RANKS = {"zero2": ["round-robin"], "zero3": ["sub-groups"], "fsdp2": ["nested"]}
# The others of these engines run in --full (DeepSpeed has one class for ZeRO-1 and 2); FSDP2's and DDP's all run often.
OFTEN_ON_TWO_RANKS = {
    "zero1": set(),
    "zero2": {
        "plain", "round-robin", "round-robin-offload", "round-robin-bf16", "no-reduce-scatter", "communicate-bf16",
        "offload", "immediate", "states-away", "masters-away", "copies-away",
    },
    "zero3": {
        "plain", "sub-groups", "persistent-all", "hpz", "no-reduce-scatter", "offload-parameters-sub-groups",
        "bf16-sub-groups-offload", "gradients-away", "cache-emptied",
    },
}  # fmt: skip
HARD = [("zero2", "plain"), ("zero3", "sub-groups")]
MUTANTS = [  # (FSDP2's shards have storages of their own: no neighbour to be shifted to)
    "zero2:plain+shifted",
    "zero3:plain+shifted",
    "zero2:plain+shifted-at-attach",
    "zero2:plain+stale",
    "zero3:plain+stale",
    "fsdp2:plain+stale",
    "ddp:plain+stale",
    "zero2:plain+moved-on-one-rank",
    "fsdp2:plain+moved-on-one-rank",
    "ddp:plain+moved-on-one-rank",
    "zero2:plain+other-mask",
    "fsdp2:plain+other-mask",
    "zero2:round-robin+vendor-places",
    "zero2:round-robin+vendor-places-and-probe",
]
HOST = [
    "zero2:offload+no-cpu-backend",
    "zero2:bf16-offload+no-cpu-backend",
    "zero3:offload+no-cpu-backend",
    "fsdp2:offload+no-cpu-backend",
    "fsdp2:replicated-offload+no-cpu-backend",
]
"""Cells whose pieces lie on the CPU while the engine's device is another."""
HOST_SELDOM = ["zero1:offload+no-cpu-backend"]
"""Such cells of --full."""


def often(engine):
    """Return the cells of the default run on two ranks; mutants come last."""
    some = OFTEN_ON_TWO_RANKS.get(engine)
    names = [name for name in cells_for(engine, 2) if some is None or name in some]
    return names + [cell.partition(":")[2] for cell in HOST + HOST_SELDOM + MUTANTS if cell.startswith(f"{engine}:")]


def seldom(engine, ranks):
    """Return the cells that only --full runs."""
    names = cells_for(engine, ranks)
    if ranks == 2:
        return [name for name in names if name not in often(engine)]
    if ranks == 3:
        return [name for name in names if name not in OFTEN_ON_THREE_RANKS.get(engine, [])]
    return [name for name in names if 2 not in CELLS[engine][name].ranks or "hpz" in name]


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


def product(names_of):
    return [(engine, name) for engine in CELLS for name in names_of(engine) if "+" not in name]


@pytest.mark.parametrize(("engine", "name"), product(often))
def test_a_cell_equals_one_process_or_is_refused_by_its_key(outcomes, engine, name):
    """Else an option of the vendor's trains or saves something else without a word."""
    assert_equal_or_refused(outcomes(engine, 2, often(engine), name), CELLS[engine][name].key)


def test_the_cells_meet_what_is_hard(outcomes):
    """Else cells pass because nothing happened: whole rows on every rank, one call a step."""
    flat, partitioned = (outcomes(engine, 2, often(engine), name)[0] for engine, name in HARD)
    assert flat["split_rows"] > 0
    assert flat["calls"] == 2
    assert partitioned["split_rows"] > 0
    assert partitioned["calls"] >= 4


@pytest.mark.parametrize("cell", MUTANTS)
def test_a_mutant_is_refused(outcomes, cell):
    """Else the suite would pass whatever the engines do."""
    engine, _, name = cell.partition(":")
    found = outcomes(engine, 2, often(engine), name)
    assert {outcome["verdict"] for outcome in found} <= {"wrong", "refused"}, found


@pytest.mark.parametrize("cell", [*HOST, *(pytest.param(cell, marks=pytest.mark.full) for cell in HOST_SELDOM)])
def test_no_cpu_tensor_is_sent_where_the_process_group_takes_none(outcomes, cell):
    """Else a run with CPU offload ends at the first guard on GPUs: NCCL has no backend for CPU tensors."""
    engine, _, name = cell.partition(":")
    assert_equal_or_refused(outcomes(engine, 2, often(engine), name), None)


@pytest.mark.parametrize(("engine", "name"), product(lambda engine: OFTEN_ON_THREE_RANKS.get(engine, [])))
def test_a_cell_on_three_ranks(outcomes, engine, name):
    """Else pieces are right only where two ranks share evenly."""
    assert_equal_or_refused(outcomes(engine, 3, OFTEN_ON_THREE_RANKS[engine], name), CELLS[engine][name].key)


@pytest.mark.full
@pytest.mark.parametrize(
    ("ranks", "engine", "name"),
    [(ranks, *cell) for ranks in (2, 3, 4) for cell in product(lambda engine, r=ranks: seldom(engine, r))],
)
def test_the_whole_suite(outcomes, ranks, engine, name):
    """Else an option is wrong where three ranks split rows, on a mesh that is a mesh, or under ZeRO-1 alone."""
    assert_equal_or_refused(outcomes(engine, ranks, seldom(engine, ranks), name), CELLS[engine][name].key)
