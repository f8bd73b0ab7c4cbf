"""Bytes of weights on a rank, for each engine: FSDP2 by sharding the real model, DeepSpeed and DDP by their rules."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from adalora_scale.cluster.plan.model import KINDS, Piece, build, pieces
from adalora_scale.cluster.plan.request import Request
from adalora_scale.config import Fsdp2Config, fsdp2_config_from_dict
from adalora_scale.engines.place import deepspeed_config, shard_fsdp2
from adalora_scale.errors import UserError
from adalora_scale.quantization.linear import Linear4bit

EngineName = Literal["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]
ENGINES: tuple[EngineName, ...] = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")


@dataclass(frozen=True)
class Zero:
    """DeepSpeed's options that decide memory, in elements; what is absent or "auto" is filled in as it is for a run."""

    reduce_bucket: int
    overlap: bool
    prefetch: int
    persistence: int
    live: int
    reuse: int
    offload_optimizer: bool
    offload_parameters: bool


@dataclass(frozen=True)
class Weights:
    """What the model's tensors take on the fullest rank (rank 0)."""

    local: dict[str, int]
    """Bytes by kind, in the dtype that stays between steps."""
    trainable: int
    """Elements of all trainable tensors."""
    local_trainable: int
    """Elements this rank owns, padding included."""


def zero_options(request: Request, stage: int, hidden: int) -> Zero:
    """Return the run's own options, or those of configs/deepspeed/ where the run uses another engine."""
    tree: dict[str, Any] = {"stage": stage, "overlap_comm": stage > 1}
    if stage == 3:
        tree |= {"reduce_bucket_size": "auto", "stage3_prefetch_bucket_size": "auto"}
        tree |= {"stage3_param_persistence_threshold": "auto"}
    engine = request.config.engine
    if own_engine(request) == f"zero{stage}":
        tree = deepspeed_config(engine.config)["zero_optimization"]

    def number(key: str, default: float, auto: float) -> int:
        value = tree.get(key, default)
        return int(auto if value == "auto" else value)

    def offloads(key: str) -> bool:
        return (tree.get(key) or {}).get("device", "none") != "none"

    overlap = tree.get("overlap_comm")
    return Zero(
        reduce_bucket=number("reduce_bucket_size", 5e8, hidden**2),
        overlap=stage == 3 if overlap is None else bool(overlap),
        prefetch=number("stage3_prefetch_bucket_size", 5e7, 0.9 * hidden**2),
        persistence=number("stage3_param_persistence_threshold", 1e5, 10 * hidden),
        live=number("stage3_max_live_parameters", 1e9, 1e9),
        reuse=number("stage3_max_reuse_distance", 1e9, 1e9),
        offload_optimizer=offloads("offload_optimizer"),
        offload_parameters=offloads("offload_param"),
    )


def own_engine(request: Request) -> EngineName:
    """Return the engine that the run's config asks for."""
    engine = request.config.engine
    if engine.name == "fsdp2":
        return "hsdp" if fsdp2_options(request).replicate > 1 else "fsdp2"
    if engine.name == "deepspeed" or (engine.name == "auto" and engine.config is not None):
        stage = deepspeed_config(engine.config)["zero_optimization"].get("stage", 0)
        return {1: "zero1", 2: "zero2", 3: "zero3"}.get(stage, "ddp")  # type: ignore[return-value]
    return "ddp"


def fsdp2_options(request: Request) -> Fsdp2Config:
    """Return the run's options of FSDP2, or the defaults."""
    engine = request.config.engine
    if engine.name != "fsdp2":
        return Fsdp2Config()
    if isinstance(engine.config, str):
        raise UserError(f"engine.config={engine.config}: FSDP2 takes keys, for example engine.config.replicate=2.")
    return fsdp2_config_from_dict(dict(engine.config or {}))


def fsdp2_weights(request: Request, options: Fsdp2Config) -> Weights:
    """Shard the model at the real number of ranks, in a pretended process group, and weigh rank 0's shards."""
    with pretended_ranks(request.gpus):
        model = build(request)
        shard_fsdp2(model, options, device_type="cpu", bf16=request.bf16)
        held = pieces(model)
        local = dict.fromkeys(KINDS, 0)
        for piece in held:
            local[piece.kind] += _local_bytes(piece)
        owned = sum(_local_bytes(piece) // piece.tensor.element_size() for piece in held if is_trained(piece))
    return Weights(local, trained_elements(held), owned)


def row_weights(held: list[Piece], ranks: int) -> Weights:
    """Weigh rank 0 by FSDP2's rule: rows are cut into equal shards, the last ones padded."""
    local = dict.fromkeys(KINDS, 0)
    owned = 0
    for piece in held:
        rows = piece.tensor.shape[0] if piece.tensor.dim() else 1
        share = piece.bytes if piece.kind == "4-bit second level" else piece.bytes // max(rows, 1) * -(-rows // ranks)
        local[piece.kind] += share
        owned += share // piece.tensor.element_size() if is_trained(piece) else 0
    return Weights(local, trained_elements(held), owned)


def whole_weights(held: list[Piece]) -> Weights:
    """Weigh a rank that holds everything (one process, DDP)."""
    local = dict.fromkeys(KINDS, 0)
    for piece in held:
        local[piece.kind] += piece.bytes
    return Weights(local, trained_elements(held), trained_elements(held))


def zero_weights(held: list[Piece], ranks: int, stage: int, options: Zero, element_size: int) -> Weights:
    """Weigh a rank under DeepSpeed: low-precision weights whole, or under ZeRO-3 partitioned tensor by tensor.

    Args:
        held: the model's tensors.
        ranks: data-parallel ranks.
        stage: 1, 2 or 3.
        options: of the configuration.
        element_size: of a floating-point weight, which DeepSpeed casts to its compute dtype.
    """
    local = dict.fromkeys(KINDS, 0)
    owned = 0
    for piece in held:
        size = element_size if piece.tensor.is_floating_point() else piece.tensor.element_size()
        count = piece.tensor.numel()
        buffer = piece.kind == "4-bit second level"
        if stage == 3 and not buffer:
            part = -(-count // ranks)
            local[piece.kind] += part * size
            if count < options.persistence and count * ranks > count:
                local[piece.kind] += count * size  # small ones also stay gathered
            owned += part if is_trained(piece) else 0
        else:
            local[piece.kind] += count * size
    trained = trained_elements(held)
    return Weights(local, trained, owned if stage == 3 else -(-trained // ranks))


def is_trained(piece: Piece) -> bool:
    """Whether the optimizer holds it."""
    return piece.kind in ("adapters", "other trainable")


def trained_elements(held: list[Piece]) -> int:
    """Return the elements of all trainable tensors."""
    return sum(piece.tensor.numel() for piece in held if is_trained(piece))


@contextlib.contextmanager
def pretended_ranks(world_size: int) -> Iterator[None]:
    """Be rank 0 of a process group without any other rank; nothing is sent.

    Raises:
        UserError: this process is in a real group already.
    """
    if dist.is_initialized():
        raise UserError("plan runs in one process by itself; start it without torchrun, deepspeed or srun.")
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(world_size)
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        if before is None:
            del os.environ["WORLD_SIZE"]
        else:
            os.environ["WORLD_SIZE"] = before


def _local_bytes(piece: Piece) -> int:
    tensor = piece.tensor
    if isinstance(tensor, DTensor):
        return int(tensor.to_local().untyped_storage().nbytes())  # rows are padded to equal shards
    return piece.bytes


def largest_matrix(model: nn.Module) -> int:
    """Return the bytes that dequantising the largest 4-bit matrix takes: 16-bit weights and float32 scales."""
    return max(
        (
            layer.in_features * layer.out_features * layer.spec.compute_dtype.itemsize + 4 * layer.scales.shape[0]
            for layer in model.modules()
            if isinstance(layer, Linear4bit)
        ),
        default=0,
    )
