"""FSDP2 and HSDP as engines: sharding a model, what a plan must know, and a loop written by hand.

FSDP2 is applied here, before the trainer sees the model: accelerate turns FSDP into DDP on machines without a GPU, and
cannot shard a model that was loaded in pieces. What the optimizer's pieces are stands in `fsdp2.py`.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Replicate

from adalora_scale.config import EngineConfig, Fsdp2Config, fsdp2_config_from_dict
from adalora_scale.engines.blocks import blocks_in_function, called_blocks
from adalora_scale.engines.by_hand import Bench, ByHand
from adalora_scale.engines.engine import Engine, Loader, Shard, refuse_casts
from adalora_scale.engines.fsdp2 import DTensorSharding
from adalora_scale.engines.planned import (
    GRADIENTS_COME_LAST,
    KINDS,
    SECOND_LEVEL,
    Moment,
    Part,
    Piece,
    Reading,
    Traffic,
    Weights,
    Work,
    around,
    statistics_part,
    trained_elements,
)
from adalora_scale.errors import Unsupported, UserError

_FROM_ACCELERATE = {"cpu_offload": "FSDP_OFFLOAD_PARAMS", "reshard_after_forward": "FSDP_RESHARD_AFTER_FORWARD"}


@dataclass(frozen=True)
class Fsdp2(Engine):
    """`fully_shard` over all ranks."""

    name = "fsdp2"
    real = "fsdp2"
    start = "torchrun --nproc-per-node N"
    preference: ClassVar[int | None] = 2
    shares_everything = True

    options: Fsdp2Config = field(default_factory=Fsdp2Config)
    """`engine.config`."""

    @classmethod
    def asked(cls, config: EngineConfig, *, by_accelerate: bool = False) -> Fsdp2:
        """Return FSDP2, or HSDP where there are several copies."""
        if isinstance(config.config, str):
            raise UserError(f"engine.config={config.config}: FSDP2 takes keys, for example engine.config.replicate=2.")
        given = dict(config.config or {})
        if by_accelerate:
            if os.environ.get("FSDP_VERSION", "1") != "2":
                raise Unsupported("accelerate's configuration asks for FSDP1; set fsdp_version: 2 in its fsdp_config.")
            for key, variable in _FROM_ACCELERATE.items():
                value = os.environ.get(variable)
                if value is not None and key not in given:
                    given[key] = value.lower() == "true"
            # The model is sharded here; accelerate would shard it again, or wrap it in DDP.
            del os.environ["ACCELERATE_USE_FSDP"]
        options = fsdp2_config_from_dict(given)
        return Hsdp(options) if options.replicate > 1 else Fsdp2(options)

    # ---- live objects -------------------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, model: nn.Module, links: Sequence[Any]) -> bool:
        """Return whether parameters are DTensors."""
        return any(isinstance(parameter, DTensor) for parameter in model.parameters())

    @classmethod
    def hold(cls, model: nn.Module, links: Sequence[Any]) -> DTensorSharding:
        """Return rows."""
        return DTensorSharding(model, links[-1])

    @classmethod
    def wraps(cls, model: nn.Module) -> bool:
        """Return whether trained parameters are sharded, and (HSDP) replicated too."""
        for parameter in model.parameters():
            if parameter.requires_grad and isinstance(parameter, DTensor):
                return any(isinstance(placement, Replicate) for placement in parameter.placements) == issubclass(
                    cls, Hsdp
                )
        return False

    @classmethod
    def is_sharded(cls, model: nn.Module) -> bool:
        """Return whether `fully_shard` was applied to the model itself."""
        return isinstance(model, FSDPModule)

    @classmethod
    @contextlib.contextmanager
    def accumulating(cls, model: Any) -> Iterator[None]:
        """Reduce gradients after the block only."""
        cls.hold_back(model)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    @staticmethod
    def hold_back(model: Any) -> None:
        """Keep whole gradients on every rank."""
        model.set_requires_gradient_sync(False)

    # ---- placing ------------------------------------------------------------------------------------------------

    def settle(self, options: dict[str, Any]) -> None:
        """Keep `bf16` out, where it would mean autocast; the sharded model computes in bfloat16 by itself."""
        refuse_casts(options, self.name)
        if options.get("fp16"):
            raise Unsupported("training.fp16 is not supported under engine.name=fsdp2; use training.bf16=true.")
        options["bf16"] = False
        if self.options.cpu_offload and not options["use_cpu"]:
            options.setdefault("ddp_backend", "cuda:nccl,cpu:gloo")  # gradient norms of shards on the host

    @property
    def streams(self) -> bool:
        """Every rank reads its own rows."""
        return True

    def sharder(self, *, device_type: str, bf16: bool) -> Shard:
        """Return `shard_fsdp2` with the run's options."""
        return partial(shard_fsdp2, options=self.options, device_type=device_type, bf16=bf16)

    def load(self, loader: Loader, *, device: torch.device, bf16: bool) -> nn.Module:
        """Shard it, with shards on the host under CPU offload."""
        storage = torch.device("cpu") if self.options.cpu_offload else device
        return loader.sharded(self.sharder(device_type=device.type, bf16=bf16), storage)

    # ---- planning -----------------------------------------------------------------------------------------------

    @classmethod
    def plain(cls, nodes: int) -> Self:
        """Return one copy over all ranks."""
        return cls(Fsdp2Config())

    def memory(self, work: Work) -> list[Part]:
        """Return shards, what is gathered of blocks in flight, and the buffers in which gradients are reduced."""
        options = self.options
        weights = work.sharded or row_weights(work.held, work.ranks // options.replicate)
        where: Moment = "host" if options.cpu_offload else "always"
        parts = []
        for kind in KINDS:
            name = "adapters (fp32)" if kind == "adapters" else kind
            parts.append(Part(name, weights.local[kind], "always" if kind == SECOND_LEVEL else where))
        owned = weights.local_trainable
        waiting = work.accumulation > 1 and options.replicate > 1  # HSDP reduces within a copy at every micro-batch
        kept: Moment = where if options.cpu_offload or waiting else "step"
        parts += [
            Part("gradients", 4 * owned, kept, GRADIENTS_COME_LAST if kept == "step" else ""),
            Part("Adam's moments", 8 * owned, where),
            statistics_part(work, owned, where),
        ]
        block, root = gathered_bytes(work.held, work.bf16)
        parts.append(Part("gathered: embeddings, head", root, "pass", "kept from forward to backward"))
        flights: tuple[tuple[Moment, int], ...] = (("forward", 2), ("loss", 1), ("backward", 2))
        for moment, units in flights:
            parts.append(Part("gathered: blocks in flight", units * block, moment, f"{units} of {work.blocks}"))
        trained: dict[int | None, int] = {}
        for piece in work.held:
            trained[piece.block] = trained.get(piece.block, 0) + piece.trained * piece.tensor.numel()
        largest = max((count for index, count in trained.items() if index is not None), default=0)
        parts.append(Part("reduction buffers", (2 + 4) * largest, "backward", "one block's gradients"))
        if work.accumulation > 1 and options.replicate == 1:
            note = "accumulation reduces them at its last micro-batch"
            parts.append(Part("gradients, not yet reduced", 4 * weights.trainable, "always", note))
        return parts

    def traffic(self, work: Work) -> Traffic:
        """Return gathering in forward and backward; one copy reduces at the last micro-batch, several at each."""
        shards = work.ranks // self.options.replicate
        trained = trained_elements(work.held)
        gram = around(work.ranks) * 2 * work.gram
        block, root = gathered_bytes(work.held, work.bf16)
        gathered = int(around(shards) * (2 * work.blocks * block + root))
        reduce = around(shards) * 4 * trained
        if shards == work.ranks:
            return Traffic(gathered, 0, int(reduce + gram))
        return Traffic(gathered, int(reduce), int(around(work.ranks // shards) * 2 * 4 * trained / shards + gram))

    def reading(self, stored: int, largest: int, *, ranks: int, per_node: int, in_4bit: bool) -> Reading:
        """Return what the rows of a node's ranks are."""
        shards = ranks // self.options.replicate
        return Reading(min(stored, stored * per_node // shards), largest // shards, per_node)

    # ---- loops written by hand ----------------------------------------------------------------------------------

    def by_hand(self, bench: Bench) -> ByHand:
        """Shard blocks and root as torch's tutorial does."""
        policy = MixedPrecisionPolicy()
        if bench.bf16:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        mesh = _mesh(bench.device.type, bench.ranks, self.options.replicate)
        names = set(getattr(bench.model, "_no_split_modules", None) or ())
        for module in bench.model.modules():
            if type(module).__name__ in names:
                fully_shard(module, mesh=mesh, mp_policy=policy)
        fully_shard(bench.model, mesh=mesh, mp_policy=policy)
        return _Fsdp2ByHand(bench, bench.model)


class Hsdp(Fsdp2):
    """FSDP2 within each of several copies of the model (`engine.config.replicate`)."""

    real = "hsdp"
    preference = None
    shares_everything = False

    @staticmethod
    def hold_back(model: Any) -> None:
        """Keep gradients sharded; only replicas wait."""
        model.set_requires_all_reduce(False)

    @classmethod
    def plain(cls, nodes: int) -> Self:
        """Return one copy a node."""
        return cls(Fsdp2Config(replicate=nodes))

    @classmethod
    def chosen_by(cls) -> str:
        """Return the name with its keys."""
        return "hsdp (engine.name=fsdp2 engine.config.replicate=N)"

    @classmethod
    def offered(cls, ranks: int, nodes: int) -> bool:
        """Return whether there are nodes to hold a copy each."""
        return ranks > 1 and nodes > 1

    def crosses_nodes(self, ranks: int, nodes: int) -> bool:
        """Return whether one copy needs more than one node."""
        return nodes > 1 and ranks // self.options.replicate > ranks // nodes

    @classmethod
    def trials(cls) -> dict[str, Engine]:
        """Return two copies."""
        return {cls.real: cls(Fsdp2Config(replicate=2))}

    @classmethod
    def why_not(cls, ranks: int) -> str:
        """Two copies of at least two ranks."""
        return "needs an even number of ranks, 4 or more" if ranks < 4 or ranks % 2 else ""


class _Fsdp2ByHand(ByHand):
    def begin(self, *, last: bool) -> None:
        self.model.set_requires_gradient_sync(last)


def shard_fsdp2(model: nn.Module, options: Fsdp2Config, *, device_type: str, bf16: bool) -> None:
    """Shard `model` in place with FSDP2: every transformer block, then what is left.

    Args:
        model: the model with its adapters, on the CPU or on this rank's device.
        options: the mesh and what is kept where.
        device_type: "cuda" or "cpu".
        bf16: gather and compute in bfloat16, reduce gradients in float32, unless `options` say otherwise.

    Raises:
        UserError: `replicate` does not divide the number of ranks.
        Unsupported: the model's blocks run where hooks on their gradients do not act.
    """
    if (function := blocks_in_function(model)) is not None:
        raise Unsupported(
            f"engine.name=fsdp2: {type(model).__name__} runs its blocks inside {function}, where FSDP2 sees no "
            f"gradients. Use engine.name=ddp."
        )
    world_size = int(os.environ["WORLD_SIZE"])
    if world_size % options.replicate:
        raise UserError(f"engine.config.replicate={options.replicate} does not divide the {world_size} ranks.")
    compute = options.param_dtype or ("bfloat16" if bf16 else None)
    reduce = options.reduce_dtype or ("float32" if compute else None)
    policy = MixedPrecisionPolicy(
        param_dtype=getattr(torch, compute) if compute else None,
        reduce_dtype=getattr(torch, reduce) if reduce else None,
    )
    offload = CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy()
    mesh = _mesh(device_type, world_size, options.replicate)
    shared: dict[str, Any] = {"mesh": mesh, "mp_policy": policy, "offload_policy": offload}
    for block in called_blocks(model):
        fully_shard(block, reshard_after_forward=options.reshard_after_forward, **shared)
    fully_shard(model, **shared)
    if hasattr(model, "generate"):
        register_fsdp_forward_method(model, "generate")


def row_weights(held: list[Piece], ranks: int) -> Weights:
    """Weigh rank 0 by FSDP2's rule: rows are cut into equal shards, the last ones padded."""
    local = dict.fromkeys(KINDS, 0)
    owned = 0
    for piece in held:
        rows = piece.tensor.shape[0] if piece.tensor.dim() else 1
        share = piece.bytes if piece.kind == SECOND_LEVEL else piece.bytes // max(rows, 1) * -(-rows // ranks)
        local[piece.kind] += share
        owned += share // piece.tensor.element_size() if piece.trained else 0
    return Weights(local, trained_elements(held), owned)


def gathered_bytes(held: list[Piece], bf16: bool) -> tuple[int, int]:
    """Return the bytes of the largest block, and of everything outside blocks, as FSDP2 gathers them."""
    blocks: dict[int | None, int] = {}
    for piece in held:
        if piece.kind != SECOND_LEVEL:
            floating = piece.tensor.is_floating_point()
            size = 2 if bf16 and floating else piece.tensor.element_size()
            blocks[piece.block] = blocks.get(piece.block, 0) + piece.tensor.numel() * size
    return max((size for block, size in blocks.items() if block is not None), default=0), blocks.get(None, 0)


def _mesh(device_type: str, ranks: int, replicate: int) -> Any:
    if replicate == 1:
        return init_device_mesh(device_type, (ranks,))
    return init_device_mesh(device_type, (replicate, ranks // replicate), mesh_dim_names=("replicate", "shard"))
