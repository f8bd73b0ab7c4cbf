"""From a live model and optimizer to intervals, and back: this rank's pieces only, nothing is gathered.

Two groups of tensors: `adapter` (A, E, B of every adapted module, with the score's statistics until the final
allocation) and `other` (whatever else is trained). Of several ranks that hold the same piece one writes it.

After the final allocation adapters may be built at their pruned ranks (`adalora/compaction.py`), so a factor can have
fewer columns in the file than in the model or the other way round; the masks say which column is which triplet, in each
matrix of a layer of experts by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from adalora_scale.adalora.compaction import columns
from adalora_scale.adalora.scores import score_named
from adalora_scale.checkpoint.flat import Group
from adalora_scale.checkpoint.format import Checkpoint, CheckpointError
from adalora_scale.checkpoint.layout import Runs, Totals, runs_of, usual_alone
from adalora_scale.controller import RankAllocator
from adalora_scale.engines import Piece, PieceState, Sharding, adapter_tensors, whole_shape
from adalora_scale.engines.ranks import together

ADAPTER, OTHER = "adapter", "other"


@dataclass
class Gathered:
    """This rank's share of a checkpoint."""

    groups: dict[str, Group] = field(default_factory=lambda: {ADAPTER: Group(), OTHER: Group()})
    shapes: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    """group → name → whole shape; the same on every rank."""
    scalars: dict[str, dict[str, float]] = field(default_factory=dict)
    """Name of a parameter → its optimizer's numbers (the step count); the usual ones under the empty name."""
    runs: Runs = field(default_factory=dict)
    """Which ranks hold what of each tensor."""
    totals: Totals = field(default_factory=dict)
    """How many elements of each tensor the ranks hold together."""


def gather(model: nn.Module, sharding: Sharding, allocator: RankAllocator) -> Gathered:
    """Collect views of what this rank has to write, and how all ranks share the tensors; a collective call.

    Of ranks that hold the same piece the first writes: whoever reads it finds all of a shard's rows in one file.

    Raises:
        Unsupported: the optimizer keeps state that cannot be cut.
    """
    gathered = Gathered(shapes=shapes_of(model, sharding))
    state = allocator.state_dict()
    pieces = sharding.pieces()
    kinds: dict[str, set[str]] = {ADAPTER: set(), OTHER: set()}
    for piece in pieces:
        kinds[_group(piece, gathered.shapes)].update(piece.state)
    for piece in pieces:
        if piece.scalars:
            gathered.scalars[piece.name] = piece.scalars
        which, _ = piece.copies
        if which:
            continue
        name = _group(piece, gathered.shapes)
        group = gathered.groups[name]
        group.intervals.append((piece.name, piece.start, piece.weight.numel()))
        values = {"weight": piece.weight}
        # A parameter that never had a gradient has no state yet; zeros with step 0 are what it would begin with.
        values |= {kind: piece.state.get(kind, torch.zeros_like(piece.weight)) for kind in sorted(kinds[name])}
        if name == ADAPTER and not allocator.frozen:
            # Zeros of factors that the score does not look at: all kinds of a group have the same intervals.
            names = [(kind, f"{kind}.{piece.name}") for kind in allocator.score.statistics]
            values |= {kind: state.get(name, torch.zeros_like(piece.weight)) for kind, name in names}
        for kind, value in values.items():
            group.values.setdefault(kind, []).append(value)
    gathered.scalars = usual_alone(gathered.scalars)
    own = {name: group.intervals for name, group in gathered.groups.items()}
    gathered.runs, gathered.totals = runs_of(gathered.shapes, own)
    return gathered


def shapes_of(model: nn.Module, sharding: Sharding) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return group → name → whole shape of everything that is trained, or was at attach and is frozen since."""
    adapters = {tensor.name: tensor.shape for tensor, _ in adapter_tensors(model)}
    others = {name: whole_shape(p) for name, p in sharding.trained().items() if name not in adapters}
    return {ADAPTER: adapters, OTHER: others}


def allocator_position(allocator: RankAllocator) -> dict[str, Any]:
    """Return the allocator's position as the manifest holds it: JSON values, the mask as 0 and 1 for each module."""
    state = {key: value for key, value in allocator.state_dict().items() if not isinstance(value, Tensor)}
    masks = {
        name.removesuffix(".lora_E"): "".join("01"[bit] for bit in row)
        for name, row in allocator.rank_pattern().items()
    }
    del state["modules"]
    return state | {"init_r": allocator.r, "score": allocator.config.score, "mask": masks}


def score_of(position: Mapping[str, Any]) -> str:
    """Return the `adalora.score` that a checkpoint's position is of; presets named the scores at first."""
    former = str(position.get("preset", "default"))
    return str(position.get("score") or {"default": "sensitivity_uncertainty"}.get(former, former))


def masks_of(position: Mapping[str, Any]) -> dict[str, list[bool]]:
    """Return module → which triplets are in the current mask, from the manifest's `allocator`."""
    return {module: [bit == "1" for bit in bits] for module, bits in position["mask"].items()}


@torch.no_grad()
def scatter(checkpoint: Checkpoint, model: nn.Module, sharding: Sharding, allocator: RankAllocator) -> None:
    """Fill this rank's pieces of weights, optimizer state and statistics, and set the allocator's position.

    Every rank calls it, between two steps, with the allocator attached.

    Raises:
        CheckpointError: the checkpoint is of a model that trains other tensors, or its files do not belong together or
            cannot be read. Raised on all ranks.
    """
    reader = together(lambda: _reader(checkpoint, model, sharding))
    _require_statistics(checkpoint, allocator)
    states: dict[str, PieceState] = {}
    scalars: dict[str, dict[str, float]] = checkpoint.manifest["optimizer"]["scalars"]
    position = dict(checkpoint.manifest["allocator"])
    masks = masks_of(position)
    state = position | {"modules": list(masks), "mask": torch.tensor([bit for row in masks.values() for bit in row])}

    def read() -> None:
        for piece in sharding.pieces():
            piece.weight.copy_(reader.values(piece, "weight"))
            kinds = reader.optimizer_kinds(piece)
            numbers = scalars.get(piece.name, scalars.get("", {}))
            if kinds or numbers:
                states[piece.name] = PieceState({kind: reader.values(piece, kind) for kind in kinds}, numbers)
        if not position["frozen"]:
            for span in sharding.spans:
                if span.tensor.factor not in allocator.score.factors:
                    continue
                piece = Piece(span.tensor.name, span.start, span.weight, {}, {})
                state.update(
                    {f"{kind}.{piece.name}": reader.values(piece, kind) for kind in allocator.score.statistics}
                )

    together(read)
    together(lambda: sharding.restore(states))  # one rank's partition may hold what another's does not
    sharding.refresh()
    allocator.load_state_dict(state)


def _require_statistics(checkpoint: Checkpoint, allocator: RankAllocator) -> None:
    """Refuse a checkpoint without the statistics of the run's score, before anything of it was taken."""
    position = checkpoint.manifest["allocator"]
    lost = set(allocator.score.statistics) - set(score_named(score_of(position)).statistics)
    if lost and not position["frozen"]:
        raise CheckpointError(
            f"the checkpoint {checkpoint.directory} has no '{min(lost)}': it is of adalora.score="
            f"{score_of(position)}, this run of {allocator.config.score}; resume with the former."
        )


@torch.no_grad()
def read_weights(checkpoint: Checkpoint, model: nn.Module, sharding: Sharding) -> None:
    """Fill this rank's pieces of the weights alone, and every copy the engine made of them.

    Raises:
        CheckpointError: as `scatter`.
    """
    reader = together(lambda: _reader(checkpoint, model, sharding))

    def read() -> None:
        for piece in sharding.pieces():
            piece.weight.copy_(reader.values(piece, "weight"))

    together(read)
    sharding.refresh()


def merged_scalars(everyone: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Put the ranks' numbers together; the most usual ones stand once, under the empty name."""
    merged = {name: numbers for own in everyone for name, numbers in own.items()}
    if not merged:
        return {}
    every = list(merged.values())
    if (usual := merged.pop("", None)) is None:
        usual = max(every, key=every.count) if len(set(map(str, every))) > 1 else every[0]
    return {"": usual} | {name: numbers for name, numbers in merged.items() if numbers != usual}


def _reader(checkpoint: Checkpoint, model: nn.Module, sharding: Sharding) -> _Reader:
    matrices = {tensor.name: tensor.matrices for tensor, _ in adapter_tensors(model)}
    return _Reader(checkpoint, shapes_of(model, sharding), matrices)


class _Reader:
    """Reads the intervals that live pieces need, with columns matched where ranks were removed."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        live: dict[str, dict[str, tuple[int, ...]]],
        matrices: dict[str, int],
    ) -> None:
        self._checkpoint, self._live = checkpoint, live
        self._matrices = matrices
        self._saved = {group: checkpoint.shapes(group) for group in (ADAPTER, OTHER)}
        self._kinds = {group: checkpoint.kinds(group) for group in (ADAPTER, OTHER)}
        self._masks = masks_of(checkpoint.manifest["allocator"])
        self._frozen = checkpoint.manifest["allocator"]["frozen"]
        self._statistics = score_named(score_of(checkpoint.manifest["allocator"])).statistics
        for name, shape in live[OTHER].items():
            if self._saved[OTHER].get(name) != shape:
                raise CheckpointError(
                    f"the checkpoint {checkpoint.directory} has shape {self._saved[OTHER].get(name)} for '{name}', the "
                    f"model trains {shape}; resume with the same model and adalora.modules_to_save."
                )

    def optimizer_kinds(self, piece: Piece) -> list[str]:
        return sorted(self._kinds[_group(piece, self._live)] - {"weight", *self._statistics})

    def values(self, piece: Piece, kind: str) -> Tensor:
        """Return a kind's elements of a live piece, (length,) on the CPU."""
        group, start, length = _group(piece, self._live), piece.start, piece.weight.numel()
        live = self._live[group][piece.name]
        saved = self._saved[group].get(piece.name)
        if saved == live:
            found = self._checkpoint.read(group, kind, piece.name, start, length)
            if found is None:
                raise CheckpointError(f"the checkpoint {self._checkpoint.directory} has no '{kind}' of '{piece.name}'.")
            return found
        return self._matched(group, kind, piece.name, saved, live)(start, length)

    def _matched(
        self, group: str, kind: str, name: str, saved: tuple[int, ...] | None, live: tuple[int, ...]
    ) -> Callable[[int, int], Tensor]:
        """Return a reader of intervals of a factor that has other columns in the file than in the model."""
        mask = self._masks.get(name.rpartition(".")[0]) or []
        matrices = self._matrices[name]
        rows = None if saved is None else saved[:-1]
        fits = self._frozen and len(mask) % matrices == 0 and mask and rows in (None, live[:-1])
        columns_saved = columns(mask, matrices, 0 if saved is None else saved[-1]) if fits else None
        columns_live = columns(mask, matrices, live[-1]) if fits else None
        if columns_saved is None or columns_live is None:
            raise CheckpointError(
                f"the checkpoint {self._checkpoint.directory} has shape {saved} for '{name}', the model {live}; resume "
                f"with the same model and adalora section."
            )
        width_saved, width = len(columns_saved[0]), len(columns_live[0])
        # Of each matrix's columns: where in a saved row their values are; one after the last is a zero.
        sources = [
            [own.index(triplet) if triplet is not None and triplet in own else width_saved for triplet in wanted]
            for own, wanted in zip(columns_saved, columns_live, strict=True)
        ]
        source = torch.tensor(sources, dtype=torch.long, device="cpu")
        rows_each = math.prod(live[:-1]) // matrices

        def read(start: int, length: int) -> Tensor:
            first, last = start // width, math.ceil((start + length) / width)
            whole = torch.zeros(last - first, width_saved + 1, dtype=torch.float32)
            if width_saved and last > first:
                flat = self._checkpoint.read(group, kind, name, first * width_saved, (last - first) * width_saved)
                if flat is not None:
                    whole[:, :-1] = flat.view(-1, width_saved)
            found = whole.gather(1, source[torch.arange(first, last, device="cpu") // rows_each])
            return found.view(-1)[start - first * width : start - first * width + length]

        return read


def _group(piece: Piece, shapes: Mapping[str, Mapping[str, Any]]) -> str:
    return ADAPTER if piece.name in shapes[ADAPTER] else OTHER
