"""Experts that stream onto engines: the bytes of one process at every number of ranks, cut inside experts too."""

from pathlib import Path

import pytest
import torch

from adalora_scale.cli import main
from tests.distributed.launcher import run_ranks
from tests.distributed.workers import streaming
from tests.experts.models import tiny

WORKER = Path(streaming.__file__)
full = pytest.mark.full


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Five experts of 12 and 6 blocks, a tensor each: 2 and 3 ranks cut the third and the second of them."""
    folder = tmp_path_factory.mktemp("mixtral")
    tiny("mixtral", dtype=torch.float32).save_pretrained(folder / "16", max_shard_size="30KB")
    assert len(list((folder / "16").glob("*.safetensors"))) > 2
    assert main(["quantize", str(folder / "16"), str(folder / "stored"), "--compute-dtype", "float32"]) == 0
    return {"16": folder / "16", "4": folder / "16", "stored": folder / "stored"}


@pytest.fixture(scope="module")
def expected(folders):
    """Digests of one process, bytes of the checkpoint, and what a pass over a few tokens gives."""
    found = {}
    for form, folder in folders.items():
        model, read = streaming.load("whole", str(folder), "16" if form == "16" else "4")
        found[form] = (streaming.digests(model), read, streaming.trained(model))
    assert found["4"][0] == found["stored"][0]
    return found


def cells():
    for engine, ranks, form, marks in (
        ("fsdp2", 2, "4", ()),
        ("fsdp2", 3, "stored", ()),
        ("zero3", 2, "4", ()),
        ("fsdp2", 3, "4", full),
        ("fsdp2", 3, "16", full),
        ("hsdp", 4, "4", full),
        ("zero3", 3, "stored", full),
        ("zero3", 3, "16", full),
    ):
        yield pytest.param(engine, ranks, form, marks=marks, id=f"{engine} x {ranks}, {form}")


@pytest.mark.parametrize(("engine", "ranks", "form"), cells())
def test_the_bytes_are_those_of_one_process(folders, expected, request, engine, ranks, form):
    """An expert whose mean is over one rank's part of it would have other scales on every number of ranks."""
    if engine == "zero3":
        request.getfixturevalue("deepspeed_ops")
    bits = "16" if form == "16" else "4"
    outputs = run_ranks(WORKER, ranks, [engine, str(folders[form]), bits], timeout=240)
    digests, size, trained = expected[form]
    parts = ranks // (2 if engine == "hsdp" else 1)
    for output in outputs:
        assert output["digests"] == digests
        if form != "16":
            own, every = output["held"]
            assert own == pytest.approx(every / parts, rel=0.02)
        assert output["trained"] == pytest.approx(trained, rel=1e-5)
        if engine == "fsdp2" and form != "16":
            assert output["bytes_survive"]
    read = [output["read"] for output in outputs]
    if engine == "zero3":
        assert read == [size] + [0] * (ranks - 1)
    else:
        copies = ranks // parts
        # Rows that a cut block shares are read twice; of stored weights every rank reads state and code book, 1.1 KB.
        constants = 1200 * (8 + 4) * ranks if form == "stored" else 0
        assert size * copies <= sum(read) <= 1.03 * size * copies + constants
