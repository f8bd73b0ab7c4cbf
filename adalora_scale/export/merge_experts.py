"""Tensors of experts in a merged model: all experts of a projection, or one expert's own, an expert at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from adalora_scale.adalora.matrices import layer_of_matrix
from adalora_scale.errors import Unsupported
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.base_checkpoint import BaseCheckpoint, Source
from adalora_scale.export.base_experts import ExpertPart, expert_place
from adalora_scale.export.dequantised_experts import StoredExperts
from adalora_scale.export.planned import Planned, added
from adalora_scale.export.tensor_files import DTYPES, FLOATING
from adalora_scale.finite import require_finite


def merged_experts(
    source: Source, adapter: AdapterFile, matrices: Sequence[str], base: BaseCheckpoint, stored: StoredExperts | None
) -> Planned:
    """Plan W + ΔW of a tensor of the checkpoint that holds experts; one expert's matrix is in memory at a time.

    Args:
        source: the tensor, which transformers takes over as it is or stacks with others.
        adapter, base: what is merged into what.
        matrices: the experts of the projection that are adapted, by their names.
        stored: the dequantised values to merge into instead of the tensor's own.

    Raises:
        Unsupported: the tensor's own values are no weights.
    """
    entry, part = source.file.entries[source.key], source.expert
    if stored is None and entry.dtype not in FLOATING:
        raise Unsupported(f"'{source.key}' is stored as {entry.dtype}; merge into the original 16-bit weights.")
    dtype, shape = (entry.dtype, entry.shape) if stored is None else (stored.dtype, stored.shape)
    place = expert_place(base.model, matrices[0]) if matrices else None
    input_first = place is not None and place.input_first
    numbers = {found[1]: name for name in matrices if (found := layer_of_matrix(name)) is not None}

    def own(number: int) -> Tensor:
        if stored is not None:
            return stored.load(number)
        if part is None:
            return source.file.rows(source.key, number, number + 1)[0]
        return source.file.tensor(source.key)

    def pieces() -> Iterator[Tensor]:
        for number in range(shape[0]) if part is None else [part.number]:
            weight = own(number)
            begin = 0 if part is None else part.part * len(weight)
            if number not in numbers:  # not adapted
                yield weight if stored is None else added(weight, 0 * weight, dtype, source.key)
                continue
            delta = adapter.update(numbers[number]).delta(begin, begin + len(weight), transposed=input_first)
            yield added(weight, delta, dtype, numbers[number])

    return Planned(source.key, dtype, shape, math.prod(shape) * DTYPES[dtype].itemsize, pieces)


def replaced_expert(source: Source, adapter: AdapterFile, name: str) -> Planned:
    """Plan one expert's own tensor of a projection that was trained in full, in the base's dtype."""
    entry, part = source.file.entries[source.key], source.expert or ExpertPart(0, 0)

    def pieces() -> list[Tensor]:
        begin = part.part * entry.shape[0]
        value = adapter.other(name)[part.number, begin : begin + entry.shape[0]].to(DTYPES[entry.dtype])
        require_finite({name: value}, f"the adapter in {DTYPES[entry.dtype]}")
        return [value.contiguous()]

    return Planned(source.key, entry.dtype, entry.shape, entry.size, pieces)
