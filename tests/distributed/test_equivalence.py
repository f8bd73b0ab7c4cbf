"""One algorithm on every engine: real ranks against one process in float64, by the criterion of DESIGN.md.

The criterion itself is `adalora_scale.verify.matrix.judge`, which users run as `adalora-scale verify-engines`. Every
cell has its adapters in two parameter groups, ZeRO-3 in several sub-groups.
"""

from pathlib import Path

import pytest
import torch

from adalora_scale.verify.engines import ENGINES, VARIANTS
from adalora_scale.verify.matrix import ALL_TOLERANCE, TENSOR_TOLERANCE, distances, expected_outcome
from adalora_scale.verify.mixture import CLASSES
from adalora_scale.verify.problem import Problem
from tests.distributed.launcher import run_ranks

WORKER = Path(__file__).parent / "workers" / "equivalence.py"


@pytest.fixture(scope="module")
def cells_of(stories260k, deepspeed_ops, tmp_path_factory):
    """Run cells of one model on ranks in one start and return what every cell came to, equal on all ranks."""
    files = {}

    def run(ranks, cells, *, model="stories260k", bits="16", preset="default", timeout=540):
        path = stories260k if model == "stories260k" else None
        experts, _, steps = model.partition(":") if model.startswith("experts") else ("", "", "")
        kinds = {cell.split(":")[1] for cell in cells}
        if "bf16" in kinds or model == "random":
            file = "none"
        else:
            file = files.get((model, bits, preset)) or tmp_path_factory.mktemp("expected") / "expected.pt"
            if not file.exists():
                problem = Problem(
                    model=None if experts else str(path),
                    experts="mixtral" if experts else None,
                    steps=int(steps or 60),
                    device=torch.device("cpu"),
                    ranks=1,
                    load_in_4bit=bits == "4",
                    preset=preset,
                )
                plain = expected_outcome("plain", problem)
                clip = None if steps else expected_outcome("clip", problem)  # few steps are for few cells
                torch.save({"clip": clip} | dict.fromkeys(("plain", "accumulation", "checkpointing"), plain), file)
            files[model, bits, preset] = file
        outputs = run_ranks(WORKER, ranks, [path or model, bits, preset, file, *cells], timeout=timeout)
        for cell in cells:
            assert all(output[cell]["verdict"] == outputs[0][cell]["verdict"] for output in outputs)
        return {cell: outputs[0][cell] for cell in cells}

    return run


def assert_all_pass(cells):
    failed = {name: cell["reason"] for name, cell in cells.items() if cell["verdict"] != "pass"}
    assert failed == {}


def shown_as(engine):
    """The column of docs/support.md."""
    return engine.removesuffix("-offload")


@pytest.fixture(scope="module")
def two_ranks(cells_of):
    plain = [f"{engine}:plain" for engine in ENGINES if engine != "hsdp"]
    return cells_of(2, [*plain, "fsdp2:clip", "zero2:clip"])


@pytest.mark.shows("features", feature="a loop of your own", engine=("ddp", "fsdp2", "zero1", "zero2", "zero3"))
@pytest.mark.shows("features", feature="gradient clipping", engine=("fsdp2", "zero2"))
def test_every_engine_equals_one_process_on_two_ranks(two_ranks):
    """Else a user who moves to another engine gets other ranks."""
    assert_all_pass(two_ranks)


def test_the_cells_meet_what_is_hard(two_ranks):
    """Else cells pass because nothing happened: one call a step, no pruning, a clip that never binds."""
    assert two_ranks["zero2:plain"]["calls"] == 2
    assert two_ranks["zero3:plain"]["calls"] >= 4
    assert all(cell["allocations"] >= 10 for cell in two_ranks.values())
    assert two_ranks["zero2:plain"]["reference_loss"] != two_ranks["zero2:clip"]["reference_loss"]


@pytest.mark.full
def test_the_published_method_too(cells_of):
    """Else what the default does without is wrong: every factor's statistics, the SVD start, the penalty."""
    cells = ["ddp:plain", "fsdp2:plain", "zero2:plain", "zero2:clip", "zero3:plain"]
    assert_all_pass(cells_of(2, cells, model="random", preset="paper"))


@pytest.mark.full
def test_rows_split_between_three_ranks(cells_of):
    """Else the penalty is wrong wherever a flat ZeRO piece ends inside a row."""
    cells = cells_of(3, ["fsdp2:plain", "zero2:plain", "zero3:plain"], preset="paper")
    assert_all_pass(cells)
    assert cells["zero2:plain"]["split_rows"] > 0
    assert cells["zero3:plain"]["split_rows"] > 0
    assert cells["zero2:plain"]["empty_spans"] > 0


@pytest.mark.shows("features", feature="a loop of your own", engine="hsdp")
@pytest.mark.full
def test_hybrid_sharding_on_four_ranks(cells_of):
    """Else HSDP counts every replica's scores, or a rank without rows of λ is lost (6 rows, 4 ranks: 2, 2, 2, 0)."""
    cells = cells_of(4, ["hsdp:plain", "fsdp2:plain"], model="random")
    assert_all_pass(cells)
    assert cells["fsdp2:plain"]["empty_spans"] > 0


def test_a_4_bit_base_changes_nothing_about_that(cells_of):
    """Else QAdaLoRA's ranks depend on the engine: the reference trains over the dequantised weights in float64."""
    cells = cells_of(2, ["ddp:plain", "fsdp2:plain", "zero2:plain", "zero3:plain"], model="random", bits="4")
    assert_all_pass(cells)
    other = cells_of(2, ["ddp:plain"], model="random")
    assert other["ddp:plain"]["reference_loss"] != cells["ddp:plain"]["reference_loss"]


def assert_routed(cells, bits):
    """The cells were about experts: all of them in `bits` bits, no token near a tie, one that none reached."""
    for cell in cells.values():
        assert cell["experts"] == ([4, 0] if bits == "4" else [0, 4])  # two projections in two layers
        assert cell["margin"] > 0.2  # of the largest value that a router chose by; engines differ by 1e-6
        assert cell["reached"] == list(range(CLASSES))


def shown_of_experts(given):
    """The row of docs/support.md."""
    other = "the same over experts in 4 bits"
    return other if given["bits"] == "4" else "experts of a mixture adapted (equals the float64 reference)"


@pytest.mark.shows("features", feature=shown_of_experts, engine="{engine}")
@pytest.mark.parametrize(("engine", "bits"), [("zero3", "16"), ("fsdp2", "4")])
def test_experts_are_matrices_on_an_engine_that_cuts_inside_one(cells_of, engine, bits):
    """Else a mixture's ranks depend on the engine: experts' triplets in pieces, an expert that no token reaches; of a
    4-bit base blocks and second levels of one expert on two ranks."""
    cells = cells_of(2, [f"{engine}:plain"], model="experts:24", bits=bits)
    assert_all_pass(cells)
    assert_routed(cells, bits)
    assert engine != "zero3" or cells["zero3:plain"]["calls"] >= 4


@pytest.mark.shows("features", feature=shown_of_experts, engine=lambda given: shown_as(given["engine"]))
@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("bits", ["16", "4"])
@pytest.mark.parametrize("engine", [engine for engine in ENGINES if engine != "hsdp"])
def test_the_row_of_experts(cells_of, engine, bits, preset, ranks):
    """Else a variant is wrong on some engine where a module stands for several matrices."""
    cells = cells_of(ranks, [f"{engine}:{variant}" for variant in VARIANTS if variant != "bf16"], model="experts",
                     bits=bits, preset=preset)  # fmt: skip
    assert_all_pass(cells)
    assert_routed(cells, bits)
    assert ranks == 2 or preset == "default" or not engine.startswith("zero") or cells[f"{engine}:plain"]["split_rows"]


@pytest.mark.shows("features", feature=shown_of_experts, engine="hsdp")
@pytest.mark.full
@pytest.mark.parametrize(("bits", "preset"), [("16", "paper"), ("4", "paper"), ("4", "default")])
def test_experts_on_four_ranks(cells_of, bits, preset):
    """Else HSDP counts every replica's experts, or ranks without rows of an expert are lost."""
    cells = cells_of(4, ["hsdp:plain", "fsdp2:plain", "zero3:plain"], model="experts", bits=bits, preset=preset)
    assert_all_pass(cells)
    assert_routed(cells, bits)


@pytest.mark.full
@pytest.mark.parametrize(
    "mutant", ["fsdp2:plain:scores", "fsdp2:plain:gram", "zero2:plain:publish", "zero3:plain:rows"]
)
def test_the_criterion_refuses_a_mutant_of_experts(cells_of, mutant):
    """Else the row of experts would pass whatever the hooks do."""
    cells = cells_of(3, ["zero3:plain", mutant], model="experts:24", preset="paper")
    assert cells["zero3:plain"]["verdict"] == "pass"
    assert cells[mutant]["verdict"] == "fail", cells[mutant]


@pytest.mark.full
def test_the_criterion_refuses_a_wrong_scale_of_one_expert(cells_of):
    """Else the row of 4-bit experts would pass whatever bytes the ranks hold."""
    mutants = [f"{engine}:plain:scale" for engine in ("ddp", "fsdp2", "zero3")]
    cells = cells_of(2, ["fsdp2:plain", *mutants], model="experts:24", bits="4")
    assert cells["fsdp2:plain"]["verdict"] == "pass"
    for mutant in mutants:
        assert "distance above" in cells[mutant]["reason"], cells[mutant]


@pytest.fixture(scope="module")
def mutants(cells_of):
    two = ["fsdp2:plain:scores", "zero2:plain:scores", "fsdp2:plain:gram", "zero2:plain:copy", "zero2:plain:publish"]
    three = ["zero2:plain", "zero2:plain:rows"]
    of_two = cells_of(2, ["zero2:plain", *two], model="random", preset="paper")
    return of_two | cells_of(3, three, model="random", preset="paper")


@pytest.mark.full
@pytest.mark.parametrize(
    "mutant",
    [
        "fsdp2:plain:scores",
        "zero2:plain:scores",
        "fsdp2:plain:gram",
        "zero2:plain:copy",
        "zero2:plain:publish",
        "zero2:plain:rows",
    ],
)
def test_the_criterion_refuses_a_mutant(mutants, mutant):
    """Else the matrix would pass whatever the hooks do."""
    assert mutants["zero2:plain"]["verdict"] == "pass"
    assert mutants[mutant]["verdict"] == "fail", mutants[mutant]


def test_the_distance_sees_one_tensor_and_what_is_not_a_number():
    """Else a wrong tensor hides among a hundred, or NaN compares as near."""
    reference = {
        "a": {"A": torch.full((1000,), 100.0).double(), "E": torch.ones(2).double()},
        "b": {"E": torch.zeros(2)},
    }
    near = {"a": {"A": torch.full((1000,), 100.0), "E": torch.ones(2) * (1 + 3e-4)}, "b": {"E": torch.zeros(2)}}
    together, worst, name = distances(near, reference)
    assert together < ALL_TOLERANCE
    assert worst > TENSOR_TOLERANCE
    assert name == "a.lora_E"
    for wrong in (float("nan"), 1e-30):
        assert distances(near | {"b": {"E": torch.tensor([0.0, wrong])}}, reference)[1] == float("inf")


@pytest.mark.shows(
    "features",
    feature="equals the float64 reference on 2, 3 and 4 ranks (HSDP: on 4)",
    engine=lambda given: shown_as(given["engine"]),
)
@pytest.mark.shows(
    "features",
    feature="CPU offload",
    engine=lambda given: shown_as(given["engine"]) if "-offload" in given["engine"] else None,
)
@pytest.mark.shows("features", feature="gradient checkpointing", engine=lambda given: shown_as(given["engine"]))
@pytest.mark.shows("features", feature="gradient clipping", engine=lambda given: shown_as(given["engine"]))
@pytest.mark.full
@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("bits", ["16", "4"])
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("engine", ENGINES)
def test_the_whole_matrix(cells_of, engine, ranks, bits, preset):
    """Else a variant that few use is wrong on some engine, or over a 4-bit base."""
    if engine == "hsdp" and ranks != 4:
        pytest.skip("HSDP needs 4 ranks")
    assert_all_pass(cells_of(ranks, [f"{engine}:{variant}" for variant in VARIANTS], bits=bits, preset=preset))
