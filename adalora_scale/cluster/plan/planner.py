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
from adalora_scale.cluster.plan.weights import ENGINES, EngineName, fsdp2_options, fsdp2_weights, own_engine
from adalora_scale.config import RunConfig


@dataclass(frozen=True)
class Row:
    """One engine of the comparison."""

    engine: EngineName
    memory: Memory
    speed: Speed
    load: Load
    largest_micro_batch: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The answer."""

    request: Request
    own: EngineName
    rows: list[Row]
    without_checkpointing: int
    """Device bytes of the run's engine if activations were kept, or recomputed: the other way than it says."""
    adapter_bytes: tuple[int, int]
    """All adapters in float32 at init_r, and at target_r if pruned triplets are removed."""
    smallest: tuple[int, EngineName, int] | None
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
        self._traces: dict[tuple[bool, bool], Traces] = {}
        self._own = own_engine(request)
        self._sharded = None
        if self._own in ("fsdp2", "hsdp"):
            self._sharded = fsdp2_weights(request, fsdp2_options(request))

    def plan(self) -> Plan:
        """Compare the engines and look for what fits."""
        request = self.request
        own = self._own
        rows = [self._row(engine) for engine in self._engines(own)]
        layers = [layer for _, layer in adapter_layers(self.model.model)]
        elements = [4 * (layer.in_features + layer.out_features + 1) for layer in layers]
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

    def _engines(self, own: EngineName) -> list[EngineName]:
        if self.request.gpus == 1:
            return sorted({"ddp", own}, key=ENGINES.index)
        return [engine for engine in ENGINES if engine != "hsdp" or own == "hsdp" or self.request.nodes > 1]

    def _row(self, engine: EngineName) -> Row:
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

    def _memory(self, engine: EngineName, sequences: int, *, other_checkpointing: bool = False) -> Memory:
        request = replace(self.request, micro_batch=sequences, global_batch=None)
        activations = self._traces_for(engine, other_checkpointing).of(sequences)
        sharded = self._sharded if engine == self._own else None
        return memory_of(engine, request, self.model, activations, sharded=sharded)

    def _traces_for(self, engine: EngineName, other_checkpointing: bool = False) -> Traces:
        key = (engine == "ddp", self.request.checkpointing != other_checkpointing)
        if key not in self._traces:
            autocast, checkpointing = key
            one, two = (
                trace_step(self.request, sequences=count, checkpointing=checkpointing, autocast=autocast)
                for count in (1, 2)
            )
            self._traces[key] = Traces(one, two)
        return self._traces[key]

    def _ways_out(self, own: EngineName, rows: list[Row], smallest: tuple[int, EngineName, Memory] | None) -> list[str]:
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
            found.append(f"{' or '.join(map(_chosen_by, others))} on these {request.gpus} GPUs")
        if not request.config.model.load_in_4bit:
            quantised = replace(request, config=replace(request.config, model=_in_4bit(request.config)))
            memory = Planner(quantised)._memory(own, request.sequences)
            if memory.device <= room:
                found.append(f"model.load_in_4bit=true ({memory.device / 1e9:.1f} GB)")
        if smallest is not None:
            count, engine, memory = smallest
            found.append(
                f"{_chosen_by(engine)} on {count} GPUs of this size, one sequence each ({memory.device / 1e9:.1f} GB)"
            )
        return found


def _in_4bit(config: RunConfig) -> Any:
    return replace(config.model, load_in_4bit=True)


def _chosen_by(engine: EngineName) -> str:
    """Return an engine with the keys that choose it."""
    if engine.startswith("zero"):
        return f"{engine} (--deepspeed configs/deepspeed/{engine}.json)"
    return f"{engine} (engine.name=fsdp2 engine.config.replicate=N)" if engine == "hsdp" else f"engine.name={engine}"
