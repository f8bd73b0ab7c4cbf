"""Bases that stream onto engines: the same bytes at every number of ranks, each rank reading its own part."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.distributed.launcher import run_ranks
from tests.distributed.workers import streaming

WORKER = Path(streaming.__file__)
full = pytest.mark.full


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A tied Llama in several shards; 21 blocks of a k_proj cannot be cut evenly by 2 or 4."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=200, hidden_size=112, intermediate_size=192, num_hidden_layers=2, num_attention_heads=14,
        num_key_value_heads=12 // 6, head_dim=8, tie_word_embeddings=True, initializer_range=0.1,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="150KB")
    return folder


@pytest.fixture(scope="module")
def expected(llama):
    """Digests of one process, and the checkpoint's size."""
    found = {}
    for bits in ("4", "16"):
        model, read = streaming.load("whole", str(llama), bits)
        found[bits] = (streaming.digests(model), read, model.adalora.base_fingerprint)
    return found


def cells():
    for engine, ranks, bits, marks in (
        ("fsdp2", 2, "4", ()),
        ("fsdp2", 3, "4", ()),
        ("zero3", 2, "4", ()),
        ("fsdp2", 2, "16", full),
        ("fsdp2", 4, "4", full),
        ("hsdp", 4, "4", full),
        ("zero3", 3, "4", full),
        ("zero3", 4, "16", full),
    ):
        yield pytest.param(engine, ranks, bits, marks=marks, id=f"{engine} x {ranks}, {bits} bits")


@pytest.mark.shows("features", feature="a base streamed from its files", engine="{engine}")
@pytest.mark.parametrize(("engine", "ranks", "bits"), cells())
def test_the_bytes_are_those_of_one_process(llama, expected, request, engine, ranks, bits):
    """Slice-local means would change a quarter of the scales, and every number of ranks would train another model."""
    if engine == "zero3":
        request.getfixturevalue("deepspeed_ops")
    outputs = run_ranks(WORKER, ranks, [engine, str(llama), bits], timeout=240)
    digests, size, fingerprint = expected[bits]
    for output in outputs:
        assert output["digests"] == digests
        assert output["fingerprint"] == fingerprint
    read = [output["read"] for output in outputs]
    if engine == "zero3":
        assert read == [size] + [0] * (ranks - 1)
    else:
        parts = ranks // (2 if engine == "hsdp" else 1)
        # Shards cut rows: a rank reads at most two rows more of each weight than it keeps (here 2 of about 100).
        assert max(read) <= 1.1 * size / parts + 0.03 * size
        assert sum(read) >= size
    if engine == "fsdp2" and bits == "4":
        assert all(output["bytes_survive"] for output in outputs)
