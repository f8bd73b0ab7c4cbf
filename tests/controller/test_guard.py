"""The checksum by which ranks compare what they hold, and where they exchange it; whole ranks: tests/distributed."""

import pytest
import torch
import torch.distributed as dist

from adalora_scale.controller.guard import checksum
from adalora_scale.engines.ranks import collective_device

DTYPES = [
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool,
    torch.uint8, torch.int64, torch.complex64, torch.complex128,
]  # fmt: skip


def values(dtype):
    torch.manual_seed(0)
    drawn = torch.randn(19, 7, dtype=torch.float64)
    return drawn > 0 if dtype == torch.bool else drawn.to(dtype)


def plain_checksum(tensor):
    """The formula in Python's integers, over little-endian words of a number's size."""
    size = tensor.element_size() // (2 if tensor.is_complex() else 1)
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    words = [int.from_bytes(data[i : i + size], "little", signed=size > 1) for i in range(0, len(data), size)]
    total = sum(word * (2 * place + 1) for place, word in enumerate(words, 1)) % 2**64
    return total - 2**64 if total >= 2**63 else total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checksum_is_the_formula_whatever_dtype_layout_and_chunk(dtype):
    """Else ranks that cut differently disagree, or a trained parameter in float64 ends the run at the first guard."""
    whole = values(dtype)
    for tensor in (whole, whole.T, whole[:, 2], whole[3, 3]):
        assert {checksum(tensor, chunk=chunk).item() for chunk in (1, 3, 7, 40, 1 << 20)} == {plain_checksum(tensor)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checksum_sees_every_bit_and_its_place(dtype):
    """A flipped bit, or two elements that changed places, would else pass as equal replicas."""
    tensor = values(dtype)
    before = checksum(tensor, chunk=10)
    raw = tensor.view(-1).view(torch.uint8)
    step = tensor.element_size()
    for byte in range(0, raw.numel(), 5):
        for bit in range(1 if dtype == torch.bool else 8):
            raw[byte] ^= 1 << bit
            assert checksum(tensor, chunk=10) != before, (byte, bit)
            raw[byte] ^= 1 << bit
    swapped = tensor.view(-1).clone()
    other = next(i for i in range(1, swapped.numel()) if not torch.equal(raw[:step], raw[i * step : (i + 1) * step]))
    swapped[0], swapped[other] = tensor.view(-1)[other].clone(), tensor.view(-1)[0].clone()
    assert checksum(swapped, chunk=10) != before
    assert checksum(tensor, chunk=10) == before


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_checksum_memory_does_not_grow_with_the_tensor(layout):
    """32 bytes an element would end a run at the first guard with a trained embedding of 525 M weights."""
    tensor = torch.zeros(3000, 3000) if layout == "contiguous" else torch.zeros(3000, 3000).T
    with torch.profiler.profile(profile_memory=True) as profile:
        checksum(tensor)
    live = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            live += event.nbytes()
            peak = max(peak, live)
    assert 0 < peak <= 64 * 2**20


@pytest.mark.parametrize(("backend", "kind"), [("gloo", "cpu"), ("cuda:gloo", "cuda"), ("cuda:gloo,cpu:gloo", "cpu")])
def test_what_ranks_compare_travels_where_the_group_has_a_backend(backend, kind, tmp_path):
    """NCCL has none for the CPU tensors of ZeRO's offload: the guard would end the run at its first call."""
    dist.init_process_group(backend, rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        assert collective_device().type == collective_device(dist.group.WORLD).type == kind
        if kind != "cpu":  # torch itself refuses what the guard gave it
            with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
                dist.all_gather([torch.zeros(1)], torch.zeros(1))
    finally:
        dist.destroy_process_group()
