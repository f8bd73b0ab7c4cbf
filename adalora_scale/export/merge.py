"""The base model with the adapter added to its weights, written tensor by tensor.

Memory does not grow with the model: weights that no adapter touches are copied in pieces, the others are read, summed
in float32 and written row block by row block, in the base's dtype. The result keeps the checkpoint's own names.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from adalora_scale.adalora.adaptables import adaptable_of, sides
from adalora_scale.adalora.base_digest import same_base
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.export.adapter_file import AdapterFile
from adalora_scale.export.base_checkpoint import BaseCheckpoint, Source
from adalora_scale.export.base_experts import expert_place
from adalora_scale.export.dequantise import Dequantised, Stored
from adalora_scale.export.merge_experts import merged_experts, replaced_expert
from adalora_scale.export.planned import Planned, added
from adalora_scale.export.tensor_files import DTYPES, FLOATING
from adalora_scale.finite import require_finite

BLOCK = 4 * 2**20  # elements that are summed at a time: 16 MiB in float32


@dataclass
class Plan:
    """What a merge will write."""

    tensors: list[Planned]
    merged: list[str]
    replaced: list[str]
    untied: bool = False


def plan_merge(adapter: AdapterFile, base: BaseCheckpoint, quantised: Dequantised | None = None) -> Plan:
    """Decide for every tensor of the checkpoint whether it is copied, summed, replaced or dequantised.

    Args:
        adapter: what to merge.
        base: into what.
        quantised: merge into these dequantised values instead of the stored weights.

    Raises:
        UserError: the adapter belongs to another base, or the base has no such weights.
        Unsupported: transformers converts an adapted weight while loading, so it cannot be summed in the checkpoint.
    """
    check_same_base(adapter, base)
    stacks = adapter.stacks
    of_experts = {name for matrices in stacks.values() for name in matrices}
    targets = {f"{module}.weight": module for module in adapter.modules if module not in of_experts}
    plan = Plan([], [], [])
    done: set[str] = set()
    stored, experts = (quantised.weights, quantised.experts) if quantised else ({}, {})
    for source in base.sources:
        if quantised and source.key in quantised.companions:
            continue
        module, other = _touched(source, base, targets, adapter)
        name = source.parameter or ""
        if name in stacks or (source.key in experts and name not in adapter.others):
            own = stacks.get(name, [])
            if own and source.converted and source.expert is None:
                _refuse_converted(own[0], source)
            plan.tensors.append(merged_experts(source, adapter, own, base, experts.get(source.key)))
            plan.merged += [] if name in done else own
            done.add(name)
            continue
        if name in adapter.others and source.expert is not None:
            plan.tensors.append(replaced_expert(source, adapter, name))
            plan.replaced += [] if name in done else [name]
            done.add(name)
            continue
        if (module or other) and source.converted:
            _refuse_converted(module or other or "", source)
        if source.key in stored and other is None:
            plan.tensors.append(dequantised(source.key, stored[source.key], adapter, module, base))
            done |= {f"{module}.weight"} if module else set()
            plan.merged += [module] if module else []
        elif module is not None:
            plan.tensors.append(merged(source, source.key, adapter, module, base.transposed(module)))
            done.add(f"{module}.weight")
            plan.merged.append(module)
            plan.untied |= any(not base.same_module(alias, name) for alias in base.aliases.get(name, []))
        elif other is not None:
            plan.tensors.append(replaced(source.key, adapter, other, source.file.entries[source.key].dtype))
            done |= {other, name}
            plan.replaced.append(other)
        elif source.parameter is not None or not _other_head(adapter, base):
            plan.tensors.append(copied(source))
    if (lacking := next((layer for layer in stacks if layer not in done), None)) is not None:
        _refuse_unsaved(lacking, base)
    _plan_the_rest(plan, done, targets, adapter, base)
    _refuse_missing(plan, base)
    return plan


def check_same_base(adapter: AdapterFile, base: BaseCheckpoint) -> None:
    """Compare names, shapes and digests.

    Raises:
        UserError: the adapter belongs to another base.
    """
    places = {name: expert_place(base.model, name) for matrices in adapter.stacks.values() for name in matrices}
    for module, shape in adapter.modules.items():
        if (place := places.get(module)) is not None:
            if place.sides != (shape.in_features, shape.out_features):
                raise UserError(
                    f"the adapter in {adapter.directory} has {(shape.out_features, shape.in_features)} for '{module}', "
                    f"the base in {base.directory} {place.sides[::-1]}; pass the base it was trained on to --base."
                )
            continue
        own = base.parameters.get(f"{module}.weight")
        if own is None:
            raise UserError(
                f"the adapter in {adapter.directory} adapts '{module}', which the base in {base.directory} does not "
                f"have; pass the base it was trained on to --base."
            )
        expected = (shape.out_features, shape.in_features)
        layer = base.model.get_submodule(module)
        if sides(layer) != expected[::-1] or adaptable_of(layer).form(layer) != shape.form:
            raise UserError(
                f"the adapter in {adapter.directory} has {expected} for '{module}', the base in {base.directory} "
                f"{tuple(own)}; pass the base it was trained on to --base."
            )
    for name, size in adapter.others.items():
        if tuple(base.parameters.get(name, ())) != size:
            raise UserError(
                f"the adapter in {adapter.directory} holds '{name}' of shape {size}, which the base in "
                f"{base.directory} has not; pass the base it was trained on to --base."
            )
    for name in base.grown:
        twins = base.aliases.get(name, []) if adapter.keeps_ties else []
        if not adapter.others.keys() & {name, *twins}:
            raise UserError(
                f"the adapter in {adapter.directory} has more embeddings than the base in {base.directory}, and no "
                f"rows of '{name}' for them; save that module with the adapter too (modules_to_save)."
            )
    adapter.require_own_copies(base.tensor)
    if not same_base(adapter.record.get("base") or {}, base.digests(adapter.layers, adapter.saved)):
        raise UserError(
            f"the adapter in {adapter.directory} was trained on another base than {base.directory} (shapes agree, "
            f"weights differ); pass the base it was trained on to --base."
        )


def copied(source: Source) -> Planned:
    """Plan a tensor that stays as it is."""
    entry = source.file.entries[source.key]

    def pieces() -> Iterator[bytes]:
        for chunk in source.file.chunks(source.key):
            if entry.dtype in FLOATING and chunk:
                values = torch.frombuffer(bytearray(chunk), dtype=DTYPES[entry.dtype])
                require_finite({source.key: values}, "the base model")
            yield chunk

    return Planned(source.key, entry.dtype, entry.shape, entry.size, pieces)


def merged(source: Source, key: str, adapter: AdapterFile, module: str, transposed: bool) -> Planned:
    """Plan W + ΔW, row block by row block."""
    entry = source.file.entries[source.key]
    if entry.dtype not in FLOATING:
        raise Unsupported(f"'{source.key}' is stored as {entry.dtype}; merge into the original 16-bit weights.")

    def pieces() -> Iterator[Tensor]:
        update = adapter.update(module)
        rows, *rest = entry.shape
        step = max(1, BLOCK // math.prod(rest))
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            weight = source.file.rows(source.key, start, stop)
            delta = update.delta(start, stop, transposed=transposed).view_as(weight)
            yield added(weight, delta, entry.dtype, module)

    return Planned(key, entry.dtype, entry.shape, entry.size, pieces)


def dequantised(key: str, stored: Stored, adapter: AdapterFile, module: str | None, base: BaseCheckpoint) -> Planned:
    """Plan the dequantised W, plus ΔW where it is adapted; one whole matrix is in memory at a time."""

    def pieces() -> Iterator[Tensor]:
        weight = stored.load()
        update = adapter.update(module) if module else None
        rows, columns = stored.shape
        step = max(1, BLOCK // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = weight[start:stop]
            delta = update.delta(start, stop, transposed=base.transposed(module)) if update and module else 0 * part
            yield added(part, delta, stored.dtype, module or key)

    size = math.prod(stored.shape) * DTYPES[stored.dtype].itemsize
    return Planned(key, stored.dtype, stored.shape, size, pieces)


def replaced(key: str, adapter: AdapterFile, name: str, dtype: str) -> Planned:
    """Plan a tensor of a module that was trained in full, in the base's dtype."""
    shape = adapter.others[name]
    size = math.prod(shape) * DTYPES[dtype].itemsize

    def pieces() -> list[Tensor]:
        value = adapter.other(name).to(DTYPES[dtype])
        require_finite({name: value}, f"the adapter in {DTYPES[dtype]}")
        return [value]

    return Planned(key, dtype, shape, size, pieces)


def _touched(
    source: Source, base: BaseCheckpoint, targets: dict[str, str], adapter: AdapterFile
) -> tuple[str | None, str | None]:
    """Return the adapted module and the fully trained tensor that the source belongs to, if any."""
    name = source.parameter
    if name is None:
        return None, None
    if name in targets or name in adapter.others:
        return targets.get(name), name if name in adapter.others else None
    group = base.aliases.get(name, [])
    # A weight trained in full is trained for all that share it; an adapter belongs to its module alone.
    other = next((alias for alias in group if alias in adapter.others and adapter.keeps_ties), None)
    module = next((targets[alias] for alias in group if alias in targets and base.same_module(alias, name)), None)
    return module, other


def _plan_the_rest(
    plan: Plan, done: set[str], targets: dict[str, str], adapter: AdapterFile, base: BaseCheckpoint
) -> None:
    """Plan what the checkpoint has under another name only (a tied head), or not at all (a new head)."""
    sources = {source.parameter: source for source in base.sources if source.parameter and not source.converted}
    for name, module in targets.items():
        if name in done:
            continue
        source = next((sources[alias] for alias in base.aliases.get(name, []) if alias in sources), None)
        if source is None:
            _refuse_unsaved(name, base)
        # The adapter changes the head alone, so head and embedding part here.
        plan.tensors.append(merged(source, name, adapter, module, base.transposed(module)))
        plan.merged.append(module)
        plan.untied = True
    _keep_other_side(plan, sources, targets, adapter, base)
    for name in adapter.others:
        written = next((alias for alias in base.aliases.get(name, []) if alias in done), None)
        if name in done or (written is not None and _same_values(adapter, name, written)):
            continue
        plan.tensors.append(replaced(name, adapter, name, base.dtype()))
        plan.replaced.append(name)
        plan.untied |= any(alias in sources for alias in base.aliases.get(name, []))
    new = [t.key for t in plan.tensors if t.key not in {source.key for source in base.sources}]
    for key in new:
        if not base.keeps_name(key):
            raise Unsupported(f"'{key}' cannot be written: transformers renames it while loading this architecture.")


def _same_values(adapter: AdapterFile, name: str, written: str) -> bool:
    """Whether a tied weight is the same under both names; one that the adapter does not hold is the other."""
    return written not in adapter.others or torch.equal(adapter.other(name), adapter.other(written))


def _keep_other_side(
    plan: Plan, sources: dict[str, Source], targets: dict[str, str], adapter: AdapterFile, base: BaseCheckpoint
) -> None:
    """Write the weight as it was for the head that an adapted embedding was tied to: the adapter is not the head's."""
    parted = [] if adapter.keeps_ties else [name for name in adapter.others if base.aliases.get(name)]
    for name in [*targets, *parted]:
        group = base.aliases.get(name, [])
        for alias in group:
            if alias in targets or alias in sources or alias in adapter.others:
                continue
            if any(base.same_module(alias, target) for target in group if target in targets or target in parted):
                continue
            if not base.is_head(alias):
                raise Unsupported(
                    f"'{name}' shares its weight with '{alias}', which is not the output head, so the two cannot part "
                    f"in a merged model; export the adapter with --format peft-lora."
                )
            source = next(sources[other] for other in group if other in sources)
            if alias not in {tensor.key for tensor in plan.tensors}:
                plan.tensors.append(dataclasses.replace(copied(source), key=alias))
                plan.untied = True


def _refuse_converted(name: str, source: Source) -> NoReturn:
    raise Unsupported(
        f"'{name}' is trained, but transformers makes it from the checkpoint's '{source.key}' while loading; merge it "
        f"in memory: load the adapter with PEFT and call merge_and_unload()."
    )


def _refuse_unsaved(name: str, base: BaseCheckpoint) -> NoReturn:
    converted = [source for source in base.sources if source.converted]
    if converted:  # one tensor may make several parameters, named after the first
        parts = set(name.split("."))
        _refuse_converted(name, max(converted, key=lambda source: len(parts & set(source.key.split(".")))))
    raise UserError(
        f"the checkpoint in {base.directory} has no '{name}': it was new when training started and was not saved. "
        f"Train with its module in adalora.modules_to_save."
    )


def _refuse_missing(plan: Plan, base: BaseCheckpoint) -> None:
    """Weights that are in neither file were drawn at random for training and are lost."""
    if any(source.converted for source in base.sources):
        return  # one tensor may make several parameters
    known = {source.parameter for source in base.sources} | {tensor.key for tensor in plan.tensors}
    for name, _ in base.model.named_parameters():
        if not known & {name, *base.aliases.get(name, [])}:
            _refuse_unsaved(name, base)


def _other_head(adapter: AdapterFile, base: BaseCheckpoint) -> bool:
    """Whether the result is of another class than the checkpoint, whose own head would only lie around."""
    has_own = adapter.task is not None and adapter.task.has_labels
    return has_own and base.config.get("architectures") != [type(base.model).__name__]
