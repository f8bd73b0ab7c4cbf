"""Engines broken on purpose, which the contract suite must refuse, and a process group that takes no CPU tensor.

A context manager here may yield a function (step, allocator) that is called after every optimizer step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adalora_scale import RankAllocator
from adalora_scale.checkpoint import layout
from adalora_scale.controller import guard
from adalora_scale.engines import full, ranks
from adalora_scale.engines.fsdp2 import DTensorSharding
from adalora_scale.engines.pieces import local
from adalora_scale.engines.replicated import ReplicatedSharding
from adalora_scale.engines.zero import ZeroSharding
from adalora_scale.engines.zero_layouts import FlatGroups

AfterStep = Callable[[int, RankAllocator], None] | None
SHARDINGS = (ZeroSharding, DTensorSharding, ReplicatedSharding)
PLANTED_AFTER = 3  # before the first allocation


@contextlib.contextmanager
def nothing() -> Iterator[AfterStep]:
    yield None


@contextlib.contextmanager
def address_off_by_one() -> Iterator[AfterStep]:
    """Every span that has a neighbour in its storage begins one element too late."""

    def after_step(step: int, allocator: RankAllocator) -> None:
        if step == PLANTED_AFTER:
            spans = allocator.sharding.spans
            spans[:] = [dataclasses.replace(span, weight=_shifted(span.weight)) for span in spans]

    yield after_step


def _shifted(weight: Tensor) -> Tensor:
    end = weight.storage_offset() + weight.numel() + 1
    if weight.numel() == 0 or end > weight.untyped_storage().nbytes() // weight.element_size():
        return weight
    return weight.as_strided(weight.shape, (1,), weight.storage_offset() + 1)


@contextlib.contextmanager
def address_off_by_one_at_attach() -> Iterator[AfterStep]:
    """The same in the engine's own construction, in one span, in the middle: what `probe()` at attach is for."""
    with contextlib.ExitStack() as stack:
        for kind in SHARDINGS:
            if "probe" in vars(kind):
                stack.enter_context(mock.patch.object(kind, "probe", _shift_and(kind.probe)))
        yield None


def _shift_and(probe: Any) -> Any:
    def shifted_probe(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not getattr(self, "_shifted_once", False):
            self._shifted_once = True
            middle = len(self.spans) // 2
            self.spans[middle] = dataclasses.replace(self.spans[middle], weight=_shifted(self.spans[middle].weight))
        return probe(self, *args, **kwargs)

    return shifted_probe


@contextlib.contextmanager
def storage_gone_stale() -> Iterator[AfterStep]:
    """Masters get other memory, as offload_states or `.data =` give it, and nobody follows; values stay."""

    def after_step(step: int, allocator: RankAllocator) -> None:
        if step != PLANTED_AFTER:
            return
        sharding: Any = allocator.sharding
        if isinstance(sharding, ZeroSharding):
            for flat in sharding._flats:
                flat.data = flat.data.clone()
            return
        for layer in allocator._layers[1:-1]:
            for kind in ("lora_A", "lora_E", "lora_B"):
                shard = local(getattr(layer, kind).detach()) if isinstance(sharding, DTensorSharding) else None
                if shard is None:
                    parameter = getattr(layer, kind)
                    parameter.data = parameter.data.clone()
                else:
                    getattr(layer, kind)._local_tensor = shard.clone()

    with mock.patch.object(ZeroSharding, "_follow", lambda self: None):
        yield after_step


@contextlib.contextmanager
def moved_on_one_rank() -> Iterator[AfterStep]:
    """What rank 1 alone computes with lies elsewhere than what its optimizer updates: nobody else can see it.

    (ZeRO-3 points its parameters at its own buffers again in every step.)
    """

    def after_step(step: int, allocator: RankAllocator) -> None:
        if step != PLANTED_AFTER or dist.get_rank() != 1:
            return
        for layer in allocator._layers[1:-1]:
            if isinstance(allocator.sharding, DTensorSharding):
                sharded: Any = layer.lora_A
                sharded._local_tensor = sharded._local_tensor.clone()
            else:
                layer.lora_A.data = layer.lora_A.data.clone()

    yield after_step


@contextlib.contextmanager
def mask_of_another_rank() -> Iterator[AfterStep]:
    """Rank 1 keeps another triplet than the others from the last allocation on."""

    def after_step(step: int, allocator: RankAllocator) -> None:
        if dist.get_rank() == 1 and allocator.frozen and not getattr(allocator, "mask_changed", False):
            allocator.mask_changed = True  # type: ignore[attr-defined]
            kept, dead = (bool_mask.nonzero()[0] for bool_mask in (allocator.mask, ~allocator.mask))
            allocator.mask[kept], allocator.mask[dead] = False, True

    yield after_step


@contextlib.contextmanager
def vendors_places() -> Iterator[AfterStep]:
    """ZeRO-1/2 spans lie where DeepSpeed's `_hp_mapping` says, which round robin makes wrong."""

    def place(self: Any, name: str, parameter: Any) -> tuple[int, int, int, int]:
        mapping = parameter._hp_mapping
        if mapping is None:
            return 0, 0, 0, 0
        low, high = mapping.lp_fragment_address, mapping.hp_fragment_address
        return mapping.param_group_index, high.start, low.start, low.numel

    with mock.patch.object(FlatGroups, "place", place):
        yield None


@contextlib.contextmanager
def vendors_places_and_probe() -> Iterator[AfterStep]:
    """The same with a probe that asks DeepSpeed's accessor, which reads through the same mapping."""
    from deepspeed.utils import safe_get_full_fp32_param

    def probe(self: Any, *args: Any, **kwargs: Any) -> None:
        for (_, parameter), span in zip(self._tensors, self.spans, strict=True):
            full = safe_get_full_fp32_param(parameter)
            seen = full.reshape(-1)[span.start : span.start + span.weight.numel()]
            if not torch.equal(seen, span.weight):
                raise RuntimeError("the vendor's accessor contradicts its own mapping")

    with vendors_places(), mock.patch.object(ZeroSharding, "probe", probe, create=True):
        yield None


# ---- a process group without a backend for CPU tensors ----------------------------------------------------------

ACCELERATOR = torch.device("xla")
"""Stands for the engine's device; nothing here can make a tensor there, so what asks for it is seen."""
TENSOR_COLLECTIVES = (
    "all_reduce", "broadcast", "reduce", "all_gather", "all_gather_into_tensor", "gather", "scatter",
    "reduce_scatter", "reduce_scatter_tensor", "all_to_all", "all_to_all_single",
)  # fmt: skip


class OnAccelerator(torch.Tensor):
    """A tensor that would lie on the accelerator; what is computed from it does too."""


class _PlacesTensors(TorchFunctionMode):
    """Marks what is made on, or moved to, `ACCELERATOR`, and takes the mark off what moves to the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        there = kwargs.get("device") == ACCELERATOR or (func is Tensor.to and ACCELERATOR in args[1:2])
        if not there:
            leaves = func is Tensor.cpu or (func is Tensor.to and args[1:2] in (("cpu",), (torch.device("cpu"),)))
            if leaves and isinstance(args[0], OnAccelerator):
                return args[0].as_subclass(Tensor).clone()
            return func(*args, **kwargs)
        if func is Tensor.to:
            return args[0].as_subclass(Tensor).detach().clone().as_subclass(OnAccelerator)
        return func(*args, **kwargs | {"device": "cpu"}).as_subclass(OnAccelerator)


@contextlib.contextmanager
def no_backend_for_cpu_tensors() -> Iterator[AfterStep]:
    """The engine's device is an accelerator, its offloaded spans lie on the CPU, and collectives of this package that
    are given a CPU tensor end as torch ends them where NCCL is the only backend."""
    own_replicas = ZeroSharding.replicas

    def replicas(self: Any) -> Any:  # under CPU offload the low-precision copies lie on the accelerator
        tensors, group = own_replicas(self)
        return [(name, tensor.as_subclass(OnAccelerator)) for name, tensor in tensors], group

    with contextlib.ExitStack() as stack:
        for kind in (ZeroSharding, DTensorSharding):
            device = property(lambda self: ACCELERATOR, lambda self, value: None)
            stack.enter_context(mock.patch.object(kind, "_device", device, create=True))
        stack.enter_context(mock.patch.object(ZeroSharding, "replicas", replicas))
        for module in (guard, full, layout, ranks):
            stack.enter_context(mock.patch.object(module, "collective_device", lambda group=None: ACCELERATOR))
        for name in TENSOR_COLLECTIVES:
            stack.enter_context(mock.patch.object(dist, name, _without_cpu(getattr(dist, name))))
        stack.enter_context(_PlacesTensors())
        yield None


def _without_cpu(collective: Any) -> Any:
    def policed(*args: Any, **kwargs: Any) -> Any:
        ours = sys._getframe(1).f_globals.get("__name__", "").startswith("adalora_scale")

        def checked(value: Any) -> Any:
            if isinstance(value, list):
                return [checked(item) for item in value]
            if not isinstance(value, Tensor):
                return value
            if ours and not isinstance(value, OnAccelerator):
                raise RuntimeError(f"No backend type associated with device type cpu ({collective.__name__})")
            return value.as_subclass(Tensor)

        return collective(*map(checked, args), **{key: checked(value) for key, value in kwargs.items()})

    return policed


MUTANTS: dict[str, Callable[[], contextlib.AbstractContextManager[AfterStep]]] = {
    "": nothing,
    "shifted": address_off_by_one,
    "shifted-at-attach": address_off_by_one_at_attach,
    "stale": storage_gone_stale,
    "moved-on-one-rank": moved_on_one_rank,
    "other-mask": mask_of_another_rank,
    "vendor-places": vendors_places,
    "vendor-places-and-probe": vendors_places_and_probe,
    "no-cpu-backend": no_backend_for_cpu_tensors,
}


def mutant_of(name: str) -> contextlib.AbstractContextManager[AfterStep]:
    return MUTANTS[name]()
