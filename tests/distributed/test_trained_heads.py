"""A new head over a bfloat16 base, on every engine: every weight moves, and a resumed run is the same run."""

import pytest
from safetensors.torch import load_file

from adalora_scale.checkpoint.format import Checkpoint
from tests.distributed.launcher import run_ranks
from tests.distributed.test_resume import TRAIN
from tests.distributed.test_trainer_engines import DEEPSPEED

FEW = (
    "model.torch_dtype=bfloat16", "training.learning_rate=2e-5", "training.weight_decay=0.0", "training.max_steps=8",
    "training.save_total_limit=9",
)  # fmt: skip
KINDS = ("weight", "exp_avg", "exp_avg_sq")


@pytest.mark.shows(
    "training",
    task="sequence_classification",
    engine=lambda given: given["engine"] if given["ranks"] > 1 else "one process",
    base="bfloat16",
)
@pytest.mark.parametrize(
    ("engine", "ranks"),
    [
        ("ddp", 1),
        *(pytest.param(engine, 2, marks=pytest.mark.full) for engine in ("ddp", "fsdp2", "zero1", "zero2", "zero3")),
    ],
)
def test_a_head_over_a_16_bit_base_learns_and_resumes(engine, ranks, stories260k, data_dir, tmp_path, request):
    """Else four fifths of a head stay at what they were drawn as, or the first checkpoint ends the run."""
    if engine in DEEPSPEED:
        request.getfixturevalue("deepspeed_ops")
    env = {"DS_ACCELERATOR": "cpu"} if engine in DEEPSPEED else {}
    options = [*FEW, *(["training.bf16=true"] if engine in DEEPSPEED else [])]

    def train(folder, *extra):
        arguments = [engine, "classify", stories260k, data_dir, folder, *options, *extra]
        return run_ranks(TRAIN, ranks, arguments, timeout=300, env=env)

    train(tmp_path / "a")
    early, late = (Checkpoint(tmp_path / "a" / "out" / f"checkpoint-{step}") for step in (4, 8))
    before, after = (c.read_whole("other", "weight", "score.weight") for c in (early, late))
    assert before.shape == (77, 64) and bool((before != after).all())
    train(tmp_path / "b", f"training.resume_from_checkpoint={early.directory}")
    again = Checkpoint(tmp_path / "b" / "out" / "checkpoint-8")
    for kind in KINDS:
        found, expected = (c.read_whole("other", kind, "score.weight") for c in (again, late))
        assert found.equal(expected), kind
    one, other = (load_file(tmp_path / name / "live.safetensors") for name in "ab")
    assert one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)
