"""A checkpoint of any engine on any number of ranks loads in one process and back, bit for bit."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adalora_scale.checkpoint.format import Checkpoint
from adalora_scale.checkpoint.state import masks_of
from adalora_scale.verify.problem import adapter_weights
from tests.distributed.launcher import run_ranks
from tests.distributed.workers import checkpoint_worker as worker

WORKER = Path(worker.__file__)
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
MOMENTS = {"exp_avg", "exp_avg_sq"}
full = pytest.mark.full


def whole(folder, step):
    """kind → name → whole tensor of a checkpoint, and its manifest."""
    checkpoint = Checkpoint(folder / f"checkpoint-{step}")
    checkpoint.verify()
    kinds = checkpoint.kinds("adapter")
    assert kinds >= {"weight", *MOMENTS}
    tensors = {
        kind: {name: checkpoint.read_whole("adapter", kind, name) for name in checkpoint.shapes("adapter")}
        for kind in kinds
    }
    return tensors, checkpoint.manifest


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    for kind, tensors in one[0].items():
        for name, tensor in tensors.items():
            assert tensor.equal(other[0][kind][name]), (kind, name)
    assert one[1]["allocator"] == other[1]["allocator"]
    assert one[1]["optimizer"]["scalars"] == other[1]["optimizer"]["scalars"]


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    """What one process wrote that trained on the same global batches."""
    folder = tmp_path_factory.mktemp("single")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    worker.train("single", worker.problem_of(1), folder, 0, 1)
    yield folder
    torch.set_num_threads(before)


@pytest.mark.parametrize("ranks", [pytest.param(1, marks=full), 2, pytest.param(4, marks=full)])
def test_every_engine_to_one_process_and_back(ranks, tmp_path, one_process, deepspeed_ops):
    """DeepSpeed's checkpoints load on the same number of GPUs only, FSDP2 kept one rank's (accelerate#4206)."""
    env = {"DS_ACCELERATOR": "cpu"}
    run_ranks(WORKER, ranks, ["write", tmp_path, *ENGINES], timeout=400, env=env)
    for engine in ENGINES:
        loaded = worker.load_and_write("single", worker.problem_of(1), tmp_path / engine, tmp_path / f"{engine}-one")
        for step, model, runner in loaded:
            live = load_file(tmp_path / engine / f"live-{step}.safetensors")
            for name, own in adapter_weights(model).items():
                for factor, weight in own.items():
                    assert weight.detach().equal(live[f"{name}.{factor}"]), (engine, step, name)
            assert runner.allocator.step == step
    run_ranks(WORKER, ranks, ["back", tmp_path, *ENGINES], timeout=400, env=env)
    for engine in ENGINES:
        for phase, step in worker.AT.items():
            written = whole(tmp_path / engine, step)
            assert_same(written, whole(tmp_path / f"{engine}-one", step))
            assert_same(written, whole(tmp_path / f"{engine}-back", step))
            reference = whole(one_process, step)
            assert written[0].keys() == reference[0].keys()
            assert ("sensitivity" in written[0]) == (phase != "after")
            assert masks_of(written[1]["allocator"]) == masks_of(reference[1]["allocator"])
            assert written[1]["optimizer"]["scalars"][""] == {"step": step}
            # Else whoever resumes opens the files of all ranks, and nobody notices below a thousand.
            assert written[1]["runs"]["adapter"].keys() == written[0]["weight"].keys()
            assert set(written[1]["kinds"]["adapter"]) == set(written[0])
            for kind, tensors in written[0].items():  # moments and importance of the right weights, not just any
                flat = torch.cat([tensor.flatten() for tensor in tensors.values()])
                expected = torch.cat([reference[0][kind][name].flatten() for name in tensors])
                assert (flat - expected).norm() <= 1e-4 * expected.norm(), (engine, phase, kind)


@pytest.mark.full
@pytest.mark.parametrize(("before", "now"), [(2, 4), (3, 2)])
def test_other_numbers_of_ranks_read_the_files_themselves(before, now, tmp_path, deepspeed_ops):
    """Each rank opens a few of the files: pieces that it looks for in the wrong one would be missed, or another's."""
    engines, env = ("fsdp2", "zero3", "zero2"), {"DS_ACCELERATOR": "cpu"}
    run_ranks(WORKER, before, ["write", tmp_path, *engines], timeout=400, env=env)
    for engine in engines:
        (tmp_path / f"{engine}-one").symlink_to(tmp_path / engine)
    run_ranks(WORKER, now, ["back", tmp_path, *engines], timeout=400, env=env)
    for engine in engines:
        for step in worker.AT.values():
            assert_same(whole(tmp_path / engine, step), whole(tmp_path / f"{engine}-back", step))
