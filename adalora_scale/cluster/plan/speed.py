"""FLOPs, traffic and seconds of an optimizer step, and of loading, from stated figures of the hardware."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from adalora_scale.adalora.adaptables import is_linear
from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.cluster.plan.active import Active, weights_of
from adalora_scale.cluster.plan.memory import OFFLOADED, PROCESS_BYTES, Memory, Model, work_of
from adalora_scale.cluster.plan.request import Request
from adalora_scale.cluster.plan.weights import engine_named
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.placing.tiled_mlp import tiled
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.quantization.linear import Linear4bit

SHORTEST_S = 0.05
"""Of a micro-batch whose time is planned. Forward and backward of a model start thousands of kernels, ~10 µs each."""


@dataclass(frozen=True)
class Flops:
    """Operations a token."""

    forward: float
    backward: float
    again: float
    """What checkpointing and tiled MLPs compute a second time."""

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

    def means_something(self, request: Request) -> bool:
        """Whether seconds and tokens/s say something: the GPU's speed is known, and arithmetic is what takes the time.

        A micro-batch of few milliseconds is bound by the start of its kernels, which is not planned.
        """
        return request.hardware.timed and self.step_s / request.accumulation >= SHORTEST_S


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
    Of experts N has those that a token is sent to. A tiled MLP is computed once more.
    """
    active = Active(model)
    output = getattr(model, "get_output_embeddings", lambda: None)()
    counts = {module: active.weights(module) for module in model.modules() if is_linear(module)}
    linear, head = sum(counts.values()), counts.get(output, 0) if isinstance(output, nn.Module) else 0
    adapters = sum(active.adapter(layer) for _, layer in adapter_layers(model))
    shape: object = model.config
    heads = int(getattr(shape, "num_attention_heads", 0))
    width = int(getattr(shape, "head_dim", 0) or getattr(shape, "hidden_size", 0) // max(heads, 1)) * heads
    attention = 2 * length * width * int(getattr(shape, "num_hidden_layers", 0))
    again = 2 * (linear - head) + attention + 2 * adapters if checkpointing else 0
    for mlp in tiled(model):
        again += 2 * sum(counts[module] for module in mlp.modules() if is_linear(module))
        again += 2 * sum(active.adapter(layer) for _, layer in adapter_layers(mlp))
    return Flops(
        forward=2 * linear + attention + 2 * adapters,
        backward=2 * linear + 2.5 * attention + 4 * adapters,
        again=again,
    )


def _dequantised(model: nn.Module, *, checkpointing: bool) -> float:
    """Return the bytes that dequantising moves a micro-batch: codes and scales read, the matrix written."""
    passes = 3 if checkpointing else 2
    moved: dict[nn.Module, float] = {
        m: _moved(m) for m in model.modules() if isinstance(m, Linear4bit | ExpertLinear4bit)
    }
    total = passes * sum(moved.values())
    for mlp, tiles in tiled(model).items():  # once a part, and in one pass more
        total += ((passes + 1) * tiles - passes) * sum(moved.get(m, 0.0) for m in mlp.modules())
    return total


def _moved(module: Linear4bit | ExpertLinear4bit) -> int:
    written = weights_of(module) * module.spec.compute_dtype.itemsize  # of all experts: a micro-batch meets each
    return module.weight.numel() + module.scales.numel() + written


def speed_of(engine: str, request: Request, model: Model, memory: Memory, *, checkpointing: bool) -> Speed:
    """Estimate an optimizer step: the slower of computing and gathering, then reducing."""
    hardware, gpu = request.hardware, request.hardware.gpu
    flops = flops_per_token(model.model, length=request.config.data.max_length, checkpointing=checkpointing)
    compute = request.tokens * flops.total / (gpu.tflops * 1e12 * hardware.efficiency)
    dequantise = _dequantised(model.model, checkpointing=checkpointing) / gpu.memory_bandwidth
    asked = engine_named(engine, request)
    traffic = asked.traffic(work_of(request, model))
    across = asked.crosses_nodes(request.gpus, request.nodes)
    bandwidth = hardware.node_bandwidth if across else gpu.link_bandwidth
    last = hardware.node_bandwidth if request.nodes > 1 else gpu.link_bandwidth
    frozen = sum(part.bytes for part in memory.parts if part.moment == "host" and "4-bit" in part.name)
    names = ("linear weights", OFFLOADED)
    frozen += sum(part.bytes for part in memory.parts if part.moment == "host" and part.name in names)
    offloaded = 2 * frozen
    micro = max(compute + dequantise, traffic.gathered / bandwidth, offloaded / hardware.host_link)
    accumulation = request.accumulation
    step = accumulation * (micro + traffic.reduced / bandwidth) + traffic.once / last
    return Speed(
        gathered=accumulation * traffic.gathered,
        reduced=accumulation * traffic.reduced + traffic.once,
        offloaded=accumulation * offloaded,
        compute_s=accumulation * compute,
        dequantise_s=accumulation * dequantise,
        communicate_s=accumulation * (traffic.gathered + traffic.reduced) / bandwidth + traffic.once / last,
        step_s=step,
        tokens_per_s=request.gpus * request.tokens * accumulation / step,
    )


def load_of(engine: str, request: Request, model: Model, memory: Memory) -> Load:
    """Estimate reading and holding the base while it loads; `placing/streaming.py` says how it is done."""
    per_node = request.gpus // request.nodes
    kinds = nn.Linear | Linear4bit | ExpertLinear | ExpertLinear4bit | nn.Embedding
    base = [module for module in model.model.modules() if isinstance(module, kinds)]
    sizes = [_elements(module) * 2 for module in base]
    reading = engine_named(engine, request).reading(
        sum(sizes),
        max(sizes, default=0),
        ranks=request.gpus,
        per_node=per_node,
        in_4bit=request.config.model.load_in_4bit,
    )
    host = per_node * (PROCESS_BYTES + memory.host) + reading.readers * reading.each
    return Load(reading.read, reading.read / request.hardware.disk_bandwidth, host)


def _elements(module: nn.Module) -> int:
    if isinstance(module, nn.Embedding):
        return module.num_embeddings * module.embedding_dim
    if isinstance(module, ExpertLinear | ExpertLinear4bit):
        return module.experts * module.in_features * module.out_features
    return int(module.in_features) * int(module.out_features)  # type: ignore[arg-type]
