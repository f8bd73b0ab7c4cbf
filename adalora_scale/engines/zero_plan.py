"""What DeepSpeed ZeRO takes and sends, by its own rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adalora_scale.engines.planned import (
    KINDS,
    SECOND_LEVEL,
    Moment,
    Part,
    Piece,
    Traffic,
    Weights,
    Work,
    around,
    statistics_part,
    trained_elements,
)


@dataclass(frozen=True)
class ZeroOptions:
    """DeepSpeed's options that decide memory, in elements; what is absent or "auto" is filled in as it is for a run."""

    reduce_bucket: int
    overlap: bool
    prefetch: int
    persistence: int
    live: int
    reuse: int
    offload_optimizer: bool
    offload_parameters: bool


def zero_options(section: dict[str, Any], stage: int, hidden: int) -> ZeroOptions:
    """Read a `zero_optimization` section for a model of a hidden size."""

    def number(key: str, default: float, auto: float) -> int:
        value = section.get(key, default)
        return int(auto if value == "auto" else value)

    def offloads(key: str) -> bool:
        return (section.get(key) or {}).get("device", "none") != "none"

    overlap = section.get("overlap_comm")
    return ZeroOptions(
        reduce_bucket=number("reduce_bucket_size", 5e8, hidden**2),
        overlap=stage == 3 if overlap is None else bool(overlap),
        prefetch=number("stage3_prefetch_bucket_size", 5e7, 0.9 * hidden**2),
        persistence=number("stage3_param_persistence_threshold", 1e5, 10 * hidden),
        live=number("stage3_max_live_parameters", 1e9, 1e9),
        reuse=number("stage3_max_reuse_distance", 1e9, 1e9),
        offload_optimizer=offloads("offload_optimizer"),
        offload_parameters=offloads("offload_param"),
    )


def zero_weights(held: list[Piece], ranks: int, stage: int, options: ZeroOptions, element_size: int) -> Weights:
    """Weigh a rank under DeepSpeed: low-precision weights whole, or under ZeRO-3 partitioned tensor by tensor.

    Args:
        held: the model's tensors.
        ranks: data-parallel ranks.
        stage: 1, 2 or 3.
        options: of the configuration.
        element_size: of a floating-point weight, which DeepSpeed casts to its compute dtype.
    """
    local = dict.fromkeys(KINDS, 0)
    owned = 0
    for piece in held:
        size = element_size if piece.tensor.is_floating_point() else piece.tensor.element_size()
        count = piece.tensor.numel()
        if stage == 3 and piece.kind != SECOND_LEVEL:
            part = -(-count // ranks)
            local[piece.kind] += part * size
            if count < options.persistence and count * ranks > count:
                local[piece.kind] += count * size  # small ones also stay gathered
            owned += part if piece.trained else 0
        else:
            local[piece.kind] += count * size
    trained = trained_elements(held)
    return Weights(local, trained, owned if stage == 3 else -(-trained // ranks))


def zero_memory(work: Work, stage: int, section: dict[str, Any]) -> list[Part]:
    """Return the parts of the fullest rank's memory under a `zero_optimization` section."""
    options = zero_options(section, stage, work.hidden)
    size = 2 if work.bf16 or work.fp16 else 4
    weights = zero_weights(work.held, work.ranks, stage, options, size)
    states: Moment = "host" if options.offload_optimizer else "always"
    frozen: Moment = "host" if options.offload_parameters else "always"
    parts = []
    for kind in KINDS:
        name = f"adapters ({'16-bit' if size == 2 else 'fp32'})" if kind == "adapters" else kind
        parts.append(Part(name, weights.local[kind], "always" if kind == SECOND_LEVEL else frozen))
    owned = weights.local_trainable
    parts += [
        Part("adapters (fp32 masters)", 4 * owned, states),
        Part("gradients", size * (weights.trainable if stage == 1 else owned), states if stage > 1 else "always"),
        Part("gradients in fp32", 4 * owned, "host" if options.offload_optimizer else "step"),
        Part("Adam's moments", 8 * owned, states),
        statistics_part(work, owned, states),
    ]
    buckets = 2 if options.overlap and stage < 3 else 1
    note = f"reduce_bucket_size {options.reduce_bucket:,} x {size} bytes x {buckets}"
    parts.append(Part("reduction buffers", options.reduce_bucket * size * buckets, "always", note))
    if stage == 3:
        parts.append(
            Part("gathered weights", _gathered(work.held, options, size), "pass", "stage3_max_live_parameters")
        )
    return parts


def zero_traffic(work: Work, stage: int) -> Traffic:
    """Return gradients, at every micro-batch from stage 2 on, and under stage 3 the weights twice a micro-batch."""
    gram = around(work.ranks) * 2 * work.gram
    size = 2 if work.bf16 else 4
    gradients = int(around(work.ranks) * size * trained_elements(work.held))
    if stage == 3:
        weights = sum(
            piece.tensor.numel() * (size if piece.tensor.is_floating_point() else piece.tensor.element_size())
            for piece in work.held
            if piece.kind != SECOND_LEVEL
        )
        return Traffic(int(around(work.ranks) * 2 * weights), gradients, int(gram))
    if stage == 2:
        return Traffic(0, gradients, int(gradients + gram))
    return Traffic(0, 0, int(2 * gradients + gram))


def _gathered(held: list[Piece], options: ZeroOptions, size: int) -> int:
    """Return the bytes of gathered parameters at the turn from forward to backward.

    DeepSpeed keeps what is used again within `max_reuse_distance` elements, and gathers ahead up to
    `prefetch_bucket_size`, never more than `max_live_parameters`. At the turn these are the head and the last blocks; a
    module that is being computed is gathered whatever the limits say.
    """
    of_block: dict[int | None, list[tuple[int, int]]] = {}
    for piece in held:
        if piece.kind != SECOND_LEVEL:
            width = size if piece.tensor.is_floating_point() else piece.tensor.element_size()
            of_block.setdefault(piece.block, []).append((piece.tensor.numel(), piece.tensor.numel() * width))
    units = [of_block[index] for index in sorted(index for index in of_block if index is not None)][::-1]
    head = max(of_block.get(None, [(0, 0)]), key=lambda pair: pair[1])
    elements, total = head
    limit = min(options.reuse // 2, options.live)  # forward to the end and back again
    for unit in units:
        count = sum(numel for numel, _ in unit)
        if elements + count > limit and total > head[1]:
            break
        elements, total = elements + count, total + sum(width for _, width in unit)
    return total + options.prefetch
