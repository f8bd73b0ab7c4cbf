"""FLOPs, traffic and seconds of an optimizer step, and of loading, from stated figures of the hardware."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from adalora_scale.adalora.adaptables import is_linear, sides
from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.cluster.plan.memory import PROCESS_BYTES, Memory, Model, fsdp2_choice, gathered_bytes
from adalora_scale.cluster.plan.request import Request
from adalora_scale.cluster.plan.weights import EngineName, trained_elements
from adalora_scale.quantization.linear import Linear4bit


@dataclass(frozen=True)
class Flops:
    """Operations a token."""

    forward: float
    backward: float
    again: float
    """What checkpointing computes a second time."""

    @property
    def total(self) -> float:
        """All of them."""
        return self.forward + self.backward + self.again


@dataclass(frozen=True)
class Speed:
    """An optimizer step of one engine."""

    gathered: int
    """Bytes of weights a rank receives a step."""
    reduced: int
    """Bytes of gradients a rank sends a step."""
    offloaded: int
    """Bytes between a GPU and its host a step."""
    compute_s: float
    """Matrix products and attention."""
    dequantise_s: float
    communicate_s: float
    """Gathering (which overlaps computing) and reducing."""
    step_s: float
    tokens_per_s: float
    """Of all GPUs."""


@dataclass(frozen=True)
class Load:
    """Loading the base model."""

    read_bytes: int
    """Read by the node that reads most."""
    seconds: float
    host_bytes: int
    """In the memory of one node, all its ranks together, at the worst moment."""


def flops_per_token(model: nn.Module, *, length: int, checkpointing: bool) -> Flops:
    """Count the operations a token: frozen weights need no gradient of their own.

    forward: 2 N + causal attention; backward: 2 N + 2.5 times that attention; adapters: 2 and 4 times their elements.
    """
    linear = head = 0
    output = getattr(model, "get_output_embeddings", lambda: None)()
    for module in model.modules():
        if not is_linear(module):
            continue
        count = math.prod(sides(module))
        linear += count
        head += count if module is output else 0
    adapters = sum(layer.r * (layer.in_features + layer.out_features) for _, layer in adapter_layers(model))
    shape: object = model.config
    heads = int(getattr(shape, "num_attention_heads", 0))
    width = int(getattr(shape, "head_dim", 0) or getattr(shape, "hidden_size", 0) // max(heads, 1)) * heads
    attention = 2 * length * width * int(getattr(shape, "num_hidden_layers", 0))
    return Flops(
        forward=2 * linear + attention + 2 * adapters,
        backward=2 * linear + 2.5 * attention + 4 * adapters,
        again=(2 * (linear - head) + attention + 2 * adapters) if checkpointing else 0,
    )


def speed_of(engine: EngineName, request: Request, model: Model, memory: Memory, *, checkpointing: bool) -> Speed:
    """Estimate an optimizer step: the slower of computing and gathering, then reducing."""
    hardware, gpu = request.hardware, request.hardware.gpu
    flops = flops_per_token(model.model, length=request.config.data.max_length, checkpointing=checkpointing)
    compute = request.tokens * flops.total / (gpu.tflops * 1e12 * hardware.efficiency)
    quantised = [m for m in model.model.modules() if isinstance(m, Linear4bit)]
    packed = sum(m.weight.numel() + m.scales.numel() for m in quantised)
    written = sum(m.in_features * m.out_features * m.spec.compute_dtype.itemsize for m in quantised)
    dequantise = (3 if checkpointing else 2) * (packed + written) / gpu.memory_bandwidth
    gathered_micro, reduced_micro, once = _traffic(engine, request, model)
    across = request.nodes > 1 and not (engine == "hsdp" and _shards(engine, request) <= request.gpus // request.nodes)
    bandwidth = hardware.node_bandwidth if across else gpu.link_bandwidth
    last = hardware.node_bandwidth if request.nodes > 1 else gpu.link_bandwidth
    frozen = sum(part.bytes for part in memory.parts if part.moment == "host" and "4-bit" in part.name)
    frozen += sum(part.bytes for part in memory.parts if part.moment == "host" and part.name == "linear weights")
    offloaded = 2 * frozen
    micro = max(compute + dequantise, gathered_micro / bandwidth, offloaded / hardware.host_link)
    accumulation = request.accumulation
    step = accumulation * (micro + reduced_micro / bandwidth) + once / last
    return Speed(
        gathered=accumulation * gathered_micro,
        reduced=accumulation * reduced_micro + once,
        offloaded=accumulation * offloaded,
        compute_s=accumulation * compute,
        dequantise_s=accumulation * dequantise,
        communicate_s=accumulation * (gathered_micro + reduced_micro) / bandwidth + once / last,
        step_s=step,
        tokens_per_s=request.gpus * request.tokens * accumulation / step,
    )


def _shards(engine: EngineName, request: Request) -> int:
    """Return the ranks that share one copy of the weights."""
    return request.gpus // (fsdp2_choice(engine, request).replicate if engine in ("fsdp2", "hsdp") else 1)


def _traffic(engine: EngineName, request: Request, model: Model) -> tuple[int, int, int]:
    """Return bytes a rank: gathered a micro-batch, reduced a micro-batch, and exchanged once a step."""
    ranks, shards = request.gpus, _shards(engine, request)
    trained = trained_elements(model.held)
    matrices = [layer for _, layer in adapter_layers(model.model)]
    # One all-reduce of all Gram matrices, 2 n of (r, r) in float32, for the orthogonality gradient.
    gram = _around(ranks) * 2 * sum(2 * layer.r**2 * 4 for layer in matrices)
    if engine == "ddp":
        return 0, 0, int(_around(ranks) * 2 * 4 * trained)
    if engine in ("fsdp2", "hsdp"):
        block, root = gathered_bytes(model.held, request.bf16)
        gathered = int(_around(shards) * (2 * model.blocks * block + root))
        reduce = _around(shards) * 4 * trained
        if shards == ranks:  # reduced at the last micro-batch
            return gathered, 0, int(reduce + gram)
        return gathered, int(reduce), int(_around(ranks // shards) * 2 * 4 * trained / shards + gram)
    size = 2 if request.bf16 else 4
    weights = sum(
        piece.tensor.numel() * (size if piece.tensor.is_floating_point() else piece.tensor.element_size())
        for piece in model.held
        if piece.kind != "4-bit second level"
    )
    gradients = int(_around(ranks) * size * trained)
    if engine == "zero3":
        return int(_around(ranks) * 2 * weights), gradients, int(gram)
    if engine == "zero2":
        return 0, gradients, int(gradients + gram)
    return 0, 0, int(2 * gradients + gram)


def load_of(engine: EngineName, request: Request, model: Model, memory: Memory) -> Load:
    """Estimate reading and holding the base while it loads; `training/loading.py` says how each engine does it."""
    per_node = request.gpus // request.nodes
    base = [module for module in model.model.modules() if isinstance(module, nn.Linear | Linear4bit | nn.Embedding)]
    sizes = [_elements(module) * 2 for module in base]
    stored, largest = sum(sizes), max(sizes, default=0)
    whole = not request.config.model.load_in_4bit and engine in ("ddp", "zero1", "zero2")
    if engine in ("fsdp2", "hsdp"):
        shards = _shards(engine, request)
        read, each = min(stored, stored * per_node // shards), largest // shards
    else:
        read, each = stored, stored if whole else largest
    readers = per_node if engine != "zero3" else 1  # under ZeRO-3 rank 0 reads, the others receive
    host = per_node * (PROCESS_BYTES + memory.host) + readers * each
    return Load(read, read / request.hardware.disk_bandwidth, host)


def _elements(module: nn.Module) -> int:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings * module.embedding_dim
    return int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]


def _around(ranks: int) -> float:
    """Return the share of a message that a ring moves through each of its ranks."""
    return (ranks - 1) / ranks
