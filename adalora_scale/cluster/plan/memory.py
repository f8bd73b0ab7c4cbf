"""The parts of a rank's memory, for each engine, at the worst moment of a step; and of its host while it loads."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from adalora_scale.cluster.plan.model import KINDS, Piece, pieces
from adalora_scale.cluster.plan.request import Request
from adalora_scale.cluster.plan.trace import Activations
from adalora_scale.cluster.plan.weights import (
    EngineName,
    Weights,
    Zero,
    fsdp2_options,
    is_trained,
    largest_matrix,
    own_engine,
    row_weights,
    whole_weights,
    zero_options,
    zero_weights,
)
from adalora_scale.config import Fsdp2Config
from adalora_scale.engines.place import transformer_blocks

Moment = Literal["always", "pass", "forward", "loss", "backward", "step", "host"]
MOMENTS: tuple[Moment, ...] = ("forward", "loss", "backward", "step")
_GRADIENTS_COME_LAST = "as activations go, gradients come"
PROCESS_BYTES = 2_000_000_000
"""Host memory of a Python process with torch, transformers and a CUDA context."""


@dataclass(frozen=True)
class Part:
    """One named share of memory."""

    name: str
    bytes: int
    moment: Moment = "always"
    """When it is there; `pass` is the whole forward and backward, `host` is not on the device."""
    note: str = ""


@dataclass
class Memory:
    """All parts on one rank of one engine."""

    engine: EngineName
    parts: list[Part] = field(default_factory=list)

    @property
    def moment(self) -> Moment:
        """The moment of the step at which the device holds most."""
        return max(MOMENTS, key=self.at)

    @property
    def device(self) -> int:
        """Bytes on the device at that moment."""
        return self.at(self.moment)

    def at(self, moment: Moment) -> int:
        """Bytes on the device at a moment."""
        return sum(part.bytes for part in self._parts_at(moment))

    @property
    def host(self) -> int:
        """Bytes in the host's memory that this rank needs during training."""
        return sum(part.bytes for part in self.parts if part.moment == "host")

    def peak_parts(self) -> list[Part]:
        """The parts of the worst moment."""
        return [part for part in self._parts_at(self.moment) if part.bytes]

    def _parts_at(self, moment: Moment) -> list[Part]:
        there = ("always", moment) if moment == "step" else ("always", "pass", moment)
        return [part for part in self.parts if part.moment in there]


@dataclass(frozen=True)
class Model:
    """What the engines share, computed once for a request."""

    model: nn.Module
    held: list[Piece]
    blocks: int
    hidden: int
    workspace: int
    """Bytes of the largest dequantised matrix."""


def describe(model: nn.Module) -> Model:
    """Look at a model on the meta device."""
    shape = model.config
    hidden = int(getattr(shape, "hidden_size", 0))
    return Model(model, pieces(model), len(transformer_blocks(model)), hidden, largest_matrix(model))


def memory_of(
    engine: EngineName, request: Request, model: Model, activations: Activations, *, sharded: Weights | None = None
) -> Memory:
    """Return the parts of one engine.

    Args:
        engine: which.
        request: the question.
        model: from `describe`.
        activations: of the request's micro-batch, in the engine's precision.
        sharded: what FSDP2 made of the real model (`fsdp2_weights`); None takes its rule instead, for a search.
    """
    memory = Memory(engine)
    if engine in ("fsdp2", "hsdp"):
        options = fsdp2_choice(engine, request)
        weights = sharded or row_weights(model.held, request.gpus // options.replicate)
        _fsdp2(memory, request, model, options, weights)
    elif engine == "ddp":
        _ddp(memory, request, model)
    else:
        _zero(memory, request, model, int(engine[-1]))
    _activations(memory, model, activations)
    memory.parts.append(Part("CUDA, cuBLAS and NCCL", request.hardware.context, note="an allowance"))
    return memory


def fsdp2_choice(engine: EngineName, request: Request) -> Fsdp2Config:
    """Return the run's own options, or plain ones: one copy over all ranks, or (HSDP) one a node."""
    if own_engine(request) == engine:
        return fsdp2_options(request)
    return Fsdp2Config(replicate=request.nodes if engine == "hsdp" else 1)


def gathered_bytes(held: list[Piece], bf16: bool) -> tuple[int, int]:
    """Return the bytes of the largest block, and of everything outside blocks, as FSDP2 gathers them."""
    blocks: dict[int | None, int] = {}
    for piece in held:
        if piece.kind != "4-bit second level":
            floating = piece.tensor.is_floating_point()
            size = 2 if bf16 and floating else piece.tensor.element_size()
            blocks[piece.block] = blocks.get(piece.block, 0) + piece.tensor.numel() * size
    return max((size for block, size in blocks.items() if block is not None), default=0), blocks.get(None, 0)


def _fsdp2(memory: Memory, request: Request, model: Model, options: Fsdp2Config, weights: Weights) -> None:
    where: Moment = "host" if options.cpu_offload else "always"
    for kind in KINDS:
        name = "adapters (fp32)" if kind == "adapters" else kind
        memory.parts.append(Part(name, weights.local[kind], "always" if kind == "4-bit second level" else where))
    owned = weights.local_trainable
    waiting = request.accumulation > 1 and options.replicate > 1  # HSDP reduces within a copy at every micro-batch
    kept: Moment = where if options.cpu_offload or waiting else "step"
    memory.parts += [
        Part("gradients", 4 * owned, kept, _GRADIENTS_COME_LAST if kept == "step" else ""),
        Part("Adam's moments", 8 * owned, where),
        Part("Ī and Ū", 8 * owned, where, "until the final allocation"),
    ]
    block, root = gathered_bytes(model.held, request.bf16)
    memory.parts.append(Part("gathered: embeddings, head", root, "pass", "kept from forward to backward"))
    for moment, units in (("forward", 2), ("loss", 1), ("backward", 2)):
        memory.parts.append(
            Part("gathered: blocks in flight", units * block, moment, f"{units} of {model.blocks}")  # type: ignore[arg-type]
        )
    trained: dict[int | None, int] = {}
    for piece in model.held:
        trained[piece.block] = trained.get(piece.block, 0) + is_trained(piece) * piece.tensor.numel()
    largest = max((count for index, count in trained.items() if index is not None), default=0)
    memory.parts.append(Part("reduction buffers", (2 + 4) * largest, "backward", "one block's gradients"))
    if request.accumulation > 1 and options.replicate == 1:
        note = "accumulation reduces them at its last micro-batch"
        memory.parts.append(Part("gradients, not yet reduced", 4 * weights.trainable, "always", note))


def _ddp(memory: Memory, request: Request, model: Model) -> None:
    weights = whole_weights(model.held)
    for kind in KINDS:
        memory.parts.append(Part("adapters (fp32)" if kind == "adapters" else kind, weights.local[kind]))
    owned = weights.trainable
    kept: Moment = "always" if request.accumulation > 1 else "step"
    memory.parts += [
        Part("gradients", 4 * owned, kept, _GRADIENTS_COME_LAST if kept == "step" else ""),
        Part("Adam's moments", 8 * owned),
        Part("Ī and Ū", 8 * owned, note="until the final allocation"),
    ]
    if request.gpus > 1:
        memory.parts.append(Part("reduction buffers", 4 * owned, note="DDP's buckets"))


def _zero(memory: Memory, request: Request, model: Model, stage: int) -> None:
    options = zero_options(request, stage, model.hidden)
    size = 2 if request.bf16 or request.config.training.get("fp16") else 4
    weights = zero_weights(model.held, request.gpus, stage, options, size)
    states: Moment = "host" if options.offload_optimizer else "always"
    frozen: Moment = "host" if options.offload_parameters else "always"
    for kind in KINDS:
        name = f"adapters ({'16-bit' if size == 2 else 'fp32'})" if kind == "adapters" else kind
        memory.parts.append(Part(name, weights.local[kind], "always" if kind == "4-bit second level" else frozen))
    owned = weights.local_trainable
    memory.parts += [
        Part("adapters (fp32 masters)", 4 * owned, states),
        Part("gradients", size * (weights.trainable if stage == 1 else owned), states if stage > 1 else "always"),
        Part("gradients in fp32", 4 * owned, "host" if options.offload_optimizer else "step"),
        Part("Adam's moments", 8 * owned, states),
        Part("Ī and Ū", 8 * owned, states, "until the final allocation"),
    ]
    buckets = 2 if options.overlap and stage < 3 else 1
    note = f"reduce_bucket_size {options.reduce_bucket:,} x {size} bytes x {buckets}"
    memory.parts.append(Part("reduction buffers", options.reduce_bucket * size * buckets, "always", note))
    if stage == 3:
        memory.parts.append(
            Part("gathered weights", _zero3_gathered(model, options, size), "pass", "stage3_max_live_parameters")
        )


def _zero3_gathered(model: Model, options: Zero, size: int) -> int:
    """Return the bytes of gathered parameters at the turn from forward to backward.

    DeepSpeed keeps what is used again within `max_reuse_distance` elements, and gathers ahead up to
    `prefetch_bucket_size`, never more than `max_live_parameters`. At the turn these are the head and the last blocks; a
    module that is being computed is gathered whatever the limits say.
    """
    of_block: dict[int | None, list[tuple[int, int]]] = {}
    for piece in model.held:
        if piece.kind != "4-bit second level":
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


def _activations(memory: Memory, model: Model, a: Activations) -> None:
    note = f"{model.blocks} blocks"
    memory.parts += [
        Part("activations of blocks", model.blocks * a.per_block, "pass", note),
        Part("activations outside blocks", a.outside, "pass"),
        Part("work of a block, forward", a.forward_peak, "forward"),
        Part("dequantised matrix", model.workspace, "forward"),
        Part("logits and loss", a.loss_peak, "loss"),
        Part("work of a block, backward", max(a.backward_peak - model.workspace, 0), "backward"),
        Part("dequantised matrix", min(a.backward_peak, model.workspace), "backward"),
    ]
