"""Runs on several ranks continue: bit for bit on the same ranks, by the equivalence criterion on other ones."""

import functools
import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from adalora_scale.checkpoint.format import Checkpoint
from tests.distributed.launcher import run_ranks
from tests.distributed.test_trainer_engines import DEEPSPEED, PER_TENSOR, TOGETHER, distances, real
from tests.distributed.workers import fault_worker, trainer_worker

TRAIN, FAULT = Path(trainer_worker.__file__), Path(fault_worker.__file__)
SAVE = ("training.save_steps=2", "training.save_total_limit=20")
full = pytest.mark.full


@pytest.fixture(scope="module")
def trained(stories260k, data_dir, tmp_path_factory, request):
    """Train on an engine, from a checkpoint or from the start: (what each rank reported, the folder)."""

    @functools.cache
    def train(engine, ranks, kind="sft", resume=None):
        if engine in DEEPSPEED:
            request.getfixturevalue("deepspeed_ops")
        folder = tmp_path_factory.mktemp(f"{engine}-{ranks}")
        # The classifier's recipe saves at every fourth step, where it evaluates.
        extra = (
            *(SAVE[1:] if kind == "classify" else SAVE),
            *([f"training.resume_from_checkpoint={resume}"] if resume else []),
        )
        env = {"DS_ACCELERATOR": "cpu"} if engine in DEEPSPEED else {}
        arguments = [engine, kind, stories260k, data_dir, folder, *extra]
        return run_ranks(TRAIN, ranks, arguments, timeout=400, env=env), folder

    return train


def shown_as(engine, ranks):
    """The column of docs/support.md."""
    return "one process" if ranks == 1 else real(engine)


def last_masks(outcome):
    return outcome["masks"].get(str(trainer_worker.FINAL_STEP))


@pytest.mark.shows(
    "features", feature="resumed bit for bit on as many ranks", engine=lambda given: real(given["engine"])
)
@pytest.mark.parametrize(
    ("engine", "step"),
    [
        ("zero3", 6),
        *(pytest.param(e, s, marks=full) for e in ("ddp", "fsdp2", "zero1", "zero2") for s in (6, 14)),
        pytest.param("zero3", 14, marks=full),
        pytest.param("zero3_offload", 6, marks=full),
    ],
)
def test_same_ranks_continue_bit_for_bit(engine, step, trained):
    """A sharded resume that is only nearly right shows nowhere but in the final model."""
    straight, folder = trained(engine, 2)
    resumed, again = trained(engine, 2, resume=folder / "out" / f"checkpoint-{step}")
    before, after = load_file(folder / "live.safetensors"), load_file(again / "live.safetensors")
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    for one, other in zip(straight, resumed, strict=True):
        assert other["norms"] == one["norms"][step:] and other["eval_loss"] == one["eval_loss"]
        assert other["masks"] == {at: mask for at, mask in one["masks"].items() if int(at) > step}


PAIRS = {
    "before": (("ddp", 2), 2, ("zero2", 4)),
    "during": (("zero3", 4), 6, ("fsdp2", 2)),
    "after, in FSDP2": (("zero2", 2), 14, ("fsdp2", 4)),
    "after, in ZeRO-3": (("fsdp2", 2), 14, ("zero3", 2)),
    "after, in ZeRO-2": (("ddp", 1), 12, ("zero2", 2)),
    "after, in DDP": (("zero3", 2), 12, ("ddp", 2)),
    "to one process": (("fsdp2", 2), 8, ("ddp", 1)),
}


@pytest.mark.shows(
    "features",
    feature="goes on from a checkpoint of another engine or number of ranks",
    engine=lambda given: shown_as(*PAIRS[given["name"]][2]),
)
@pytest.mark.shows(
    "features", feature="a checkpoint of it goes on elsewhere", engine=lambda given: shown_as(*PAIRS[given["name"]][0])
)
@full
@pytest.mark.parametrize("name", PAIRS)
def test_another_engine_continues_to_the_same_adapter(name, trained):
    """A user who loses half of the GPUs would have to start again, or get another model."""
    source, step, target = PAIRS[name]
    outcome, reference = trained("ddp", 1)
    _, folder = trained(*source)
    ranks, ended = trained(*target, resume=folder / "out" / f"checkpoint-{step}")
    for rank in ranks:
        expected = {at: mask for at, mask in outcome[0]["masks"].items() if int(at) > step}
        assert rank["masks"] == expected
        assert rank["norms"] == pytest.approx(outcome[0]["norms"][step:], rel=1e-4)
        assert rank["eval_loss"] == pytest.approx(outcome[0]["eval_loss"], rel=1e-5)
    manifest = Checkpoint(ended / "out" / "checkpoint-16").manifest
    assert manifest["compact"] == (step >= trainer_worker.FINAL_STEP)
    names = [path / "out" / "adapter_model.safetensors" for path in (ended, reference)]
    together, worst = distances(*(load_file(path) for path in names))
    print(f"{name}: together {together:.1e}, worst tensor {worst:.1e}")
    assert together <= TOGETHER and worst <= PER_TENSOR


@full
@pytest.mark.parametrize("target", ["fsdp2", "zero3"])
def test_a_classifier_head_moves_with_its_moments(target, trained):
    """What is trained beside the adapters is sharded by other rules and must come along whole."""
    outcome, reference = trained("ddp", 1, "classify")
    _, folder = trained("zero2", 2, "classify")
    ranks, ended = trained(target, 2, "classify", folder / "out" / "checkpoint-8")
    assert ranks[0]["best"] == outcome[0]["best"]
    assert ranks[0]["norms"] == pytest.approx(outcome[0]["norms"][8:], rel=1e-4)
    together, worst = distances(*(load_file(path / "live.safetensors") for path in (ended, reference)))
    assert together <= TOGETHER and worst <= PER_TENSOR


@pytest.fixture
def fault(stories260k, data_dir, tmp_path, request):
    """Let something happen to the last rank: (what each rank reported, the folder)."""

    def run(what, engine, ranks=2):
        if engine in DEEPSPEED:
            request.getfixturevalue("deepspeed_ops")
        env = {"DS_ACCELERATOR": "cpu"} if engine in DEEPSPEED else {}
        return run_ranks(FAULT, ranks, [what, engine, stories260k, data_dir, tmp_path], timeout=300, env=env), tmp_path

    return run


@pytest.mark.shows("features", feature="stopped by a signal", engine="{engine}")
@pytest.mark.parametrize("engine", ["fsdp2", *(pytest.param(name, marks=full) for name in ("ddp", "zero2", "zero3"))])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(engine, fault):
    """Else one rank leaves and the others wait for it until a timeout, without a checkpoint."""
    ranks, folder = fault("signal", engine)
    assert [(rank["ended"], rank["code"]) for rank in ranks] == [("interrupted", 85)] * 2
    # The signal came in step 6; whoever had ended it by then learns of it in step 7.
    assert [rank["found"] for rank in ranks] == [["checkpoint-4", "checkpoint-7"]] * 2
    Checkpoint(folder / "out" / "checkpoint-7").verify()
    assert json.loads((folder / "out" / "requeue").read_text())["step"] == 7


def test_one_rank_with_a_full_disk_stops_all_and_leaves_the_last_checkpoint(fault):
    """Else the others wait for it, or rank 0 calls a half checkpoint complete."""
    ranks, folder = fault("full", "fsdp2")
    for rank in ranks:
        assert rank["ended"] == "refused" and rank["found"] == ["checkpoint-4"]
        assert "pieces-00001-of-00002.safetensors cannot be written" in rank["message"]
        assert rank["message"].endswith("(rank 1)")
    Checkpoint(folder / "out" / "checkpoint-4").verify()


def test_an_output_dir_that_is_not_shared_is_refused_at_the_start(fault):
    """Else the first checkpoint fails after hours, or holds one machine's pieces."""
    ranks, _ = fault("apart", "ddp")
    for rank in ranks:
        assert rank["ended"] == "refused" and "must be one file system that all machines share" in rank["message"]
