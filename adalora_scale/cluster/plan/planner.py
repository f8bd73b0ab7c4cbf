"""Answers one request: build, trace, add up, compare the engines, look for what fits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.cluster.plan.advice import Traces, largest_micro_batch, smallest_cluster
from adalora_scale.cluster.plan.memory import Memory, Model, describe, memory_of
from adalora_scale.cluster.plan.model import build
from adalora_scale.cluster.plan.request import Request
from adalora_scale.cluster.plan.speed import Load, Speed, load_of, speed_of
from adalora_scale.cluster.plan.trace import trace_step
from adalora_scale.cluster.plan.weights import own_engine, sharded_weights
from adalora_scale.config import RunConfig
from adalora_scale.engines.registry import ENGINES


@dataclass(frozen=True)
class Row:
    """One engine of the comparison."""

    engine: str
    memory: Memory
    speed: Speed
    load: Load
    largest_micro_batch: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The answer."""

    request: Request
    own: str
    rows: list[Row]
    without_checkpointing: int
    """Device bytes of the run's engine if activations were kept, or recomputed: the other way than it says."""
    adapter_bytes: tuple[int, int]
    """All adapters in float32 at init_r, and at target_r if pruned triplets are removed."""
    smallest: tuple[int, str, int] | None
    """GPUs, engine and device bytes of the smallest cluster, with one sequence a micro-batch."""
    ways_out: list[str]
    """Where the run does not fit: what would."""

    @property
    def own_row(self) -> Row:
        """The run's own engine."""
        return next(row for row in self.rows if row.engine == self.own)


class Planner:
    """Answers one request; traces are made once each."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.model: Model = describe(build(request))
        self._traces: dict[tuple[bool, bool, bool], Traces] = {}
        own = own_engine(request)
        self._own = own.real
        shard = own.sharder(device_type="cpu", bf16=request.bf16)
        self._sharded = None if shard is None else sharded_weights(request, shard)

    def plan(self) -> Plan:
        """Compare the engines and look for what fits."""
        request = self.request
        own = self._own
        rows = [self._row(engine) for engine in self._engines(own)]
        layers = [layer for _, layer in adapter_layers(self.model.model)]
        elements = [4 * layer.matrices * layer.triplet_size for layer in layers]
        adalora = request.config.adalora
        per_node = request.gpus // request.nodes if request.nodes > 1 else max(request.gpus, 8)
        smallest = smallest_cluster(request, self.model, self._traces_for, per_node)
        mine = next(row for row in rows if row.engine == own)
        return Plan(
            request=request,
            own=own,
            rows=rows,
            without_checkpointing=self._memory(own, request.sequences, other_checkpointing=True).device,
            adapter_bytes=(sum(elements) * adalora.init_r, sum(elements) * adalora.target_r),
            smallest=None if smallest is None else (smallest[0], smallest[1], smallest[2].device),
            ways_out=[] if mine.fits else self._ways_out(own, rows, smallest),
        )

    def _engines(self, own: str) -> list[str]:
        ranks, nodes = self.request.gpus, self.request.nodes
        return [name for name, engine in ENGINES.items() if name == own or engine.offered(ranks, nodes)]

    def _row(self, engine: str) -> Row:
        memory = self._memory(engine, self.request.sequences)
        room = self.request.hardware.gpu.memory
        most = largest_micro_batch(lambda count: self._memory(engine, count).device <= room)
        return Row(
            engine=engine,
            memory=memory,
            speed=speed_of(engine, self.request, self.model, memory, checkpointing=self.request.checkpointing),
            load=load_of(engine, self.request, self.model, memory),
            largest_micro_batch=most,
            fits=memory.device <= room,
        )

    def _memory(self, engine: str, sequences: int, *, other_checkpointing: bool = False) -> Memory:
        request = replace(self.request, micro_batch=sequences, global_batch=None)
        activations = self._traces_for(engine, other_checkpointing).of(sequences)
        sharded = self._sharded if engine == self._own else None
        return memory_of(engine, request, self.model, activations, sharded=sharded)

    def _traces_for(self, engine: str, other_checkpointing: bool = False) -> Traces:
        chosen = ENGINES[engine]
        key = (chosen.autocast, chosen.hooks_layers, self.request.checkpointing != other_checkpointing)
        if key not in self._traces:
            autocast, hooked, checkpointing = key
            one, two = (
                trace_step(self.request, sequences=count, checkpointing=checkpointing, autocast=autocast, hooked=hooked)
                for count in (1, 2)
            )
            self._traces[key] = Traces(one, two)
        return self._traces[key]

    def _ways_out(self, own: str, rows: list[Row], smallest: tuple[int, str, Memory] | None) -> list[str]:
        """Name changes after which the run fits, the smallest change first."""
        request, room = self.request, self.request.hardware.gpu.memory
        mine = next(row for row in rows if row.engine == own)
        found = []
        if mine.largest_micro_batch:
            found.append(f"training.per_device_train_batch_size={mine.largest_micro_batch}")
        if not request.checkpointing and self._memory(own, request.sequences, other_checkpointing=True).device <= room:
            found.append("training.gradient_checkpointing=true")
        others = [row.engine for row in rows if row.fits and row.engine != own]
        if others:
            found.append(f"{' or '.join(ENGINES[name].chosen_by() for name in others)} on these {request.gpus} GPUs")
        if not request.config.model.load_in_4bit:
            quantised = replace(request, config=replace(request.config, model=_in_4bit(request.config)))
            memory = Planner(quantised)._memory(own, request.sequences)
            if memory.device <= room:
                found.append(f"model.load_in_4bit=true ({memory.device / 1e9:.1f} GB)")
        if smallest is not None:
            count, engine, memory = smallest
            chosen = ENGINES[engine].chosen_by()
            found.append(f"{chosen} on {count} GPUs of this size, one sequence each ({memory.device / 1e9:.1f} GB)")
        return found


def _in_4bit(config: RunConfig) -> Any:
    return replace(config.model, load_in_4bit=True)
