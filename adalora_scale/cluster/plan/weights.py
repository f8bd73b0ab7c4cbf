"""The engines that a plan compares, and the bytes of weights on a rank where the real model can be sharded."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from adalora_scale.cluster.plan.model import build, pieces
from adalora_scale.cluster.plan.request import Request
from adalora_scale.engines.engine import Engine, Shard
from adalora_scale.engines.planned import KINDS, Piece, Weights, trained_elements
from adalora_scale.engines.registry import ENGINES, configured
from adalora_scale.errors import UserError
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.quantization.linear import Linear4bit


def own_engine(request: Request) -> Engine:
    """Return the engine that the run's config asks for."""
    return configured(request.config.engine)


def engine_named(name: str, request: Request) -> Engine:
    """Return an engine with the run's own options, or as the project ships it where the run uses another."""
    own = own_engine(request)
    return own if own.real == name else ENGINES[name].plain(request.nodes)


def sharded_weights(request: Request, shard: Shard) -> Weights:
    """Shard the model at the real number of ranks, in a pretended process group, and weigh rank 0's shards."""
    with pretended_ranks(request.gpus):
        model = build(request)
        shard(model)
        held = pieces(model)
        local = dict.fromkeys(KINDS, 0)
        for piece in held:
            local[piece.kind] += _local_bytes(piece)
        owned = sum(_local_bytes(piece) // piece.tensor.element_size() for piece in held if piece.trained)
    return Weights(local, trained_elements(held), owned)


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
    """Return the bytes that dequantising the largest 4-bit matrix takes: 16-bit weights and float32 scales.

    Of experts it is one's.
    """
    found = [0]
    for layer in model.modules():
        if isinstance(layer, Linear4bit | ExpertLinear4bit):
            blocks = layer.blocks if isinstance(layer, ExpertLinear4bit) else layer.scales.shape[0]
            found.append(layer.in_features * layer.out_features * layer.spec.compute_dtype.itemsize + 4 * blocks)
    return max(found)
