"""Being one rank of a group whose other ranks are not there, over weights that have shapes and no values."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
from torch.distributed.tensor import debug
from torch.testing._internal.distributed.fake_pg import FakeStore

from adalora_scale.errors import UserError

DEVICE = "meta"


@contextlib.contextmanager
def pretended_rank(rank: int, world_size: int) -> Iterator[None]:
    """Be `rank` of torch's fake process group, and let FSDP2 (torch 2.11 to 2.15) take the meta device for a device.

    Raises:
        UserError: this process is in a real group already.
    """
    if dist.is_initialized():
        raise UserError("rehearse runs in one process by itself; start it without torchrun, deepspeed or srun.")
    parameters = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_param")
    sharding = importlib.import_module("torch.distributed.fsdp._fully_shard._fully_shard")
    ours = {"WORLD_SIZE": str(world_size), "RANK": str(rank), "LOCAL_RANK": "0"}
    with (
        mock.patch.dict(os.environ, ours),
        mock.patch.object(torch, DEVICE, torch.cpu, create=True),  # where streams and events are looked for
        mock.patch.object(sharding, "_get_device_from_mesh", _device_of),
        mock.patch.object(parameters, "_chunk_with_empty", _Chunks),
        mock.patch.object(FSDPParamGroup, "_validate_no_meta_params", lambda group: None),
    ):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        # DTensor's rules are kept with a mesh that knows the rank it was made on; another rank's mesh is equal to it.
        debug._clear_sharding_prop_cache()
        try:
            yield
        finally:
            dist.destroy_process_group()


class _Chunks:
    """What `torch.chunk` gives, made when asked for: FSDP2 makes the chunks of all ranks, of every parameter, to take
    its own (a minute at 4,096 ranks of a 70 B model, and no part of what is rehearsed)."""

    def __init__(self, tensor: Tensor, num_chunks: int, dim: int) -> None:
        self._tensor, self._dim = tensor, dim
        self._each = -(-tensor.size(dim) // num_chunks)

    def __getitem__(self, number: int) -> Tensor:
        first = number * self._each
        length = min(self._each, self._tensor.size(self._dim) - first)
        if length <= 0 and number:
            return self._tensor.new_empty(0)
        return self._tensor.narrow(self._dim, first, max(length, 0))


def _device_of(mesh: DeviceMesh) -> torch.device:
    return torch.device(mesh.device_type)
