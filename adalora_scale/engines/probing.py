"""The proof that a rank's spans are the values the model's forward computes with.

A check must not ask the thing it checks: what is compared here with the spans is read where the forward reads it
(the live module's parameter; after FSDP2's unshard; after ZeRO-3's gather), never through an engine's accessor of its
master weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from adalora_scale.engines.span import Span

See = Callable[[int, Tensor], None]
"""Takes the index of a span and the whole tensor that the forward computes with."""

_BITS = 12
_VALUES = 1 << _BITS
_CHUNK = 1 << 22


class Probed(Protocol):
    """What a probe asks of an engine."""

    spans: list[Span]

    def refresh(self) -> None:
        """Bring every copy of the masters up to date; a collective call."""

    def see_forward(self, see: See) -> None:
        """Show every adapter tensor, whole, as the forward computes with it; a collective call."""


@torch.no_grad()
def misplaced(held: Probed, *, write: bool) -> str | None:
    """Return the name of a tensor whose span on this rank is not what the forward computes with, or None.

    A collective call.

    Args:
        held: an engine's hold of a model.
        write: also write numbers of its own into every span, see them arrive whole in the forward, and put the weights
            back. Right after attach λ is zero everywhere, so reading alone could not tell one λ from another.
    """
    found: list[str] = []
    if write:
        _write_and_see(held, found)

    def compare(index: int, whole: Tensor) -> None:
        span = held.spans[index]
        if not same_values(span.weight, whole.reshape(-1)[span.start : span.start + span.weight.numel()]):
            found.append(span.tensor.name)

    held.see_forward(compare)
    return found[0] if found else None


def same_values(master: Tensor, computed: Tensor) -> bool:
    """Return whether low-precision values are the rounded master weights, bit for bit (NaN equals NaN)."""
    if master.numel() != computed.numel():
        return False
    for start in range(0, master.numel(), _CHUNK):
        part = slice(start, start + _CHUNK)
        own, other = master[part].to(computed.dtype), computed[part].to(master.device)
        if not torch.equal(own, other) and not torch.equal(own.nan_to_num(), other.nan_to_num()):
            return False
    return True


def _write_and_see(held: Probed, found: list[str]) -> None:
    firsts = _first_numbers(held.spans)
    batches = _batches(held.spans)
    before = [torch.cat([held.spans[index].weight for index in batch]) for batch in batches]
    for batch in batches:
        _put(held.spans, batch, _patterns([(firsts[i] + held.spans[i].start, held.spans[i]) for i in batch]))

    def compare(index: int, whole: Tensor) -> None:
        span = held.spans[index]
        expected = pattern(firsts[index], span.tensor.numel, whole.device)
        if whole.numel() != expected.numel() or not torch.equal(whole.reshape(-1).float(), expected):
            found.append(span.tensor.name)

    try:
        held.refresh()
        held.see_forward(compare)
    finally:
        for batch, kept in zip(batches, before, strict=True):
            _put(held.spans, batch, kept)
        held.refresh()


def _batches(spans: Sequence[Span]) -> list[list[int]]:
    """Group the spans that have elements, neighbours on one device, up to `_CHUNK` elements unless one alone has more:
    among thousands of ranks a span is a few rows, and an operation for each would be all that an attach does."""
    batches: list[list[int]] = []
    room, device = 0, None
    for index, span in enumerate(spans):
        elements = span.weight.numel()
        if elements and (elements > room or span.weight.device != device):
            batches.append([])
            room, device = max(_CHUNK, elements), span.weight.device
        if elements:
            batches[-1].append(index)
            room -= elements
    return batches


def _put(spans: Sequence[Span], batch: list[int], flat: Tensor) -> None:
    weights = [spans[index].weight for index in batch]
    torch._foreach_copy_(weights, list(flat.split([weight.numel() for weight in weights])))


def _patterns(pieces: Sequence[tuple[int, Span]]) -> Tensor:
    """Return the numbers of several spans one after the other; each is given with the number of its first element."""
    lengths = [span.weight.numel() for _, span in pieces]
    device = pieces[0][1].weight.device
    begins = [0, *accumulate(lengths)]
    shifts = torch.tensor([first - begin for (first, _), begin in zip(pieces, begins, strict=False)], device=device)
    counts = torch.tensor(lengths, device=device)
    number = torch.arange(begins[-1], dtype=torch.int64, device=device)
    return _numbers(number.add_(shifts.repeat_interleave(counts, output_size=begins[-1])))


def _first_numbers(spans: Sequence[Span]) -> list[int]:
    """Number all elements of all adapter tensors; return the number of each tensor's first."""
    firsts, count = [], 0
    for span in spans:
        firsts.append(count)
        count += span.tensor.numel
    return firsts


def pattern(first: int, length: int, device: torch.device) -> Tensor:
    """Return float32 numbers for the elements first … first + length: neighbours within 4,096 differ, and so do blocks.

    All are exact in bfloat16 and float16: 7 bits of mantissa, 16 exponents, 2 signs.
    """
    return _numbers(torch.arange(first, first + length, dtype=torch.int64, device=device))


def _numbers(number: Tensor) -> Tensor:
    block = number >> _BITS
    code = number.mul_(2731).add_(block, alpha=1237).bitwise_and_(_VALUES - 1)  # 2731 is odd: a permutation of a block
    return _values(number.device).index_select(0, code)


@cache
def _values(device: torch.device) -> Tensor:
    """Return the (4096,) different numbers; computing them for every element took three times the operations."""
    code = torch.arange(_VALUES, dtype=torch.int64, device=device)
    mantissa, exponent, negative = code % 128, code // 128 % 16, code // 2048
    value = torch.ldexp(1 + mantissa.float() / 128, (exponent - 8).float())
    return torch.where(negative.bool(), -value, value)
