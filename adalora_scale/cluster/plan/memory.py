"""The parts of a rank's memory, for each engine, at the worst moment of a step; and of its host while it loads."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.adalora.scores import score_named
from adalora_scale.cluster.plan.model import pieces
from adalora_scale.cluster.plan.request import Request
from adalora_scale.cluster.plan.trace import Activations
from adalora_scale.cluster.plan.weights import engine_named, largest_matrix
from adalora_scale.engines.blocks import transformer_blocks
from adalora_scale.engines.planned import Moment, Part, Piece, Weights, Work, trained_elements

MOMENTS: tuple[Moment, ...] = ("forward", "loss", "backward", "step")
OFFLOADED = "activations moved off the device"
_STASHED = 5
"""Blocks' activations on the device under training.activation_offloading: TRL waits for a copy with five tensors behind
it, and of checkpointed blocks there is one tensor each; of others there are more, and fewer blocks wait."""
PROCESS_BYTES = 2_000_000_000
"""Host memory of a Python process with torch, transformers and a CUDA context."""


@dataclass
class Memory:
    """All parts on one rank of one engine."""

    engine: str
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
    engine: str, request: Request, model: Model, activations: Activations, *, sharded: Weights | None = None
) -> Memory:
    """Return the parts of one engine.

    Args:
        engine: its real name.
        request: the question.
        model: from `describe`.
        activations: of the request's micro-batch, in the engine's precision.
        sharded: what the engine made of the real model (`sharded_weights`); None takes its rule instead, for a search.
    """
    memory = Memory(engine, engine_named(engine, request).memory(work_of(request, model, sharded)))
    _activations(memory, model, activations, offload=bool(request.config.training.get("activation_offloading")))
    memory.parts.append(Part("CUDA, cuBLAS and NCCL", request.hardware.context, note="an allowance"))
    return memory


def work_of(request: Request, model: Model, sharded: Weights | None = None) -> Work:
    """Return what an engine has to know of a request."""
    adalora, layers = request.config.adalora, list(adapter_layers(model.model))
    score = score_named(adalora.score)
    looked_at = sum(getattr(layer, factor).numel() for _, layer in layers for factor in score.factors)
    return Work(
        held=model.held,
        blocks=model.blocks,
        hidden=model.hidden,
        ranks=request.gpus,
        accumulation=request.accumulation,
        bf16=request.bf16,
        fp16=bool(request.config.training.get("fp16")),
        # Two matrices each, (r, r) in float32.
        gram=sum(2 * layer.matrices * layer.r**2 * 4 for _, layer in layers) if adalora.orth_reg_weight else 0,
        remembered=4 * len(score.statistics) * looked_at / max(trained_elements(model.held), 1),
        sharded=sharded,
    )


def _activations(memory: Memory, model: Model, a: Activations, *, offload: bool) -> None:
    note = f"{model.blocks} blocks"
    stay = min(model.blocks, _STASHED) if offload else model.blocks
    if offload:
        note = f"{stay} of {note}"
        memory.parts.append(Part(OFFLOADED, (model.blocks - stay) * a.per_block, "host"))
    memory.parts += [
        Part("activations of blocks", stay * a.per_block, "pass", note),
        Part("activations outside blocks", a.outside, "pass"),
        Part("work of a block, forward", a.forward_peak, "forward"),
        Part("dequantised matrix", model.workspace, "forward"),
        Part("logits and loss", a.loss_peak, "loss"),
        Part("work of a block, backward", max(a.backward_peak - model.workspace, 0), "backward"),
        Part("dequantised matrix", min(a.backward_peak, model.workspace), "backward"),
    ]
