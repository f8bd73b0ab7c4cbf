"""FSDP2 and HSDP: adapters are DTensors, sharded by rows over one mesh dimension and replicated over the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.optim import Optimizer

from adalora_scale.engines.direct import DirectSharding
from adalora_scale.engines.draws import require_one_adapter
from adalora_scale.engines.full import settle
from adalora_scale.engines.pieces import local
from adalora_scale.engines.probing import See
from adalora_scale.engines.span import Span, adapter_tensors, check_held, no_cuts
from adalora_scale.errors import Unsupported


class DTensorSharding(DirectSharding):
    """Spans that are this rank's rows; a span is empty where there are fewer rows than ranks.

    Under HSDP the replicas of a shard hold the same gradients. Sums go over all ranks all the same, and are divided by
    the number of replicas: what is wrong on one replica is then known to all.

    Args:
        model: a model whose adapters `fully_shard` sharded.
        optimizer: the torch optimizer that updates them.

    Raises:
        UserError: the optimizer does not hold an adapter parameter, or ranks hold rows of different adapters.
        Unsupported: an adapter is not a DTensor, is not float32, or is placed otherwise than by rows; another trained
            parameter is not sharded.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        tensors = adapter_tensors(model)
        check_held(tensors, optimizer)
        super().__init__(model, [parameter for _, parameter in tensors], optimizer)
        adapters: list[DTensor] = []
        self.spans: list[Span] = []
        for tensor, parameter in tensors:
            placed = _checked(parameter, tensor.name)
            _, offset = compute_local_shape_and_global_offset(placed.shape, placed.device_mesh, placed.placements)
            start = offset[0] * (tensor.r if placed.dim() > 1 else 1)
            # Detached first: under grad mode to_local() is a view with a history, which in-place updates invalidate.
            rows = local(placed.detach())
            start = start if rows.numel() else 0
            self.spans.append(Span(tensor=tensor, start=start, weight=rows.view(-1), shape=tuple(rows.shape)))
            adapters.append(placed)
        first = adapters[0]
        mesh = first.device_mesh
        for (tensor, _), placed in zip(tensors, adapters, strict=True):
            if placed.device_mesh != mesh or placed.placements != first.placements:
                raise Unsupported(
                    f"'{tensor.name}' lies on another mesh than the other adapters; shard all on one mesh."
                )
        if mesh.size() != dist.get_world_size():
            raise Unsupported(
                f"the adapters' mesh has {mesh.size()} of {dist.get_world_size()} ranks; use a mesh over all of them."
            )
        sharded = [dim for dim, placement in enumerate(first.placements) if isinstance(placement, Shard)]
        self._copies = mesh.size() // (mesh.size(sharded[0]) if sharded else 1)
        replicated = [dim for dim, placement in enumerate(first.placements) if isinstance(placement, Replicate)]
        self._replicas = mesh.get_group(replicated[0]) if len(replicated) == 1 else None
        self._device = torch.device(mesh.device_type)
        self._require_sharded()

    def connect(self) -> None:
        """See that the rows of all ranks are of one adapter."""
        self.cuts = no_cuts(self.spans)
        require_one_adapter(self._model, self.spans)

    def updating(self, optimizer: Optimizer) -> list[int]:
        """Free gathered weights that set_reshard_after_backward(False) kept: the next forward would use them again."""
        if any(not isinstance(parameter, DTensor) for parameter in self._live.parameters()):
            self.refresh()
        return super().updating(optimizer)

    def refresh(self) -> None:
        """Free what a forward without backward (an evaluation) left gathered: it holds the values of that time."""
        settle(self._model)

    def see_forward(self, see: See) -> None:
        """Gather module by module, as a forward does, and show what the adapter layers then hold."""
        seen: set[int] = set()

        def show() -> None:
            for index, parameter in enumerate(self._live.parameters()):
                if index not in seen and not isinstance(parameter, DTensor):
                    seen.add(index)
                    see(index, parameter.detach())

        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.unshard()
                show()
                module.reshard()
        for index, parameter in enumerate(self._live.parameters()):
            if index not in seen:  # sharded by other means than fully_shard: the forward computes with DTensors
                see(index, parameter.detach().to(self._device).full_tensor())  # type: ignore[attr-defined]

    def all_reduce(self, buffer: Tensor) -> None:
        """Sum over the ranks that hold other rows; the mean over those that hold the same."""
        # FSDP2's CPU offload keeps shards on the host, where NCCL cannot reduce.
        moved = buffer.to(self._device)
        dist.all_reduce(moved)
        if self._copies > 1:
            moved /= self._copies
        if moved is not buffer:
            buffer.copy_(moved)

    def agree(self, squares: Tensor) -> None:
        """Nothing to do: the sums went over all ranks."""

    def broadcast(self, tensor: Tensor) -> None:
        """Take rank 0's tensor on every rank."""
        moved = tensor.to(self._device)
        dist.broadcast(moved, src=0)
        if moved is not tensor:
            tensor.copy_(moved)

    @torch.no_grad()
    def write(self, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Overwrite this rank's rows of parameters of which whole values are given, and free what was gathered."""
        for parameter, value in values:
            placed = _checked(parameter, "a parameter")
            shape, offset = compute_local_shape_and_global_offset(placed.shape, placed.device_mesh, placed.placements)
            placed.to_local().copy_(value[offset[0] : offset[0] + shape[0]])
        self.refresh()

    def replicas(self) -> tuple[list[tuple[str, Tensor]], dist.ProcessGroup | None]:
        """Under HSDP the ranks along the replicated mesh dimension hold the same rows."""
        if self._replicas is None:
            return [], None
        return self.held_tensors(), self._replicas

    def _require_sharded(self) -> None:
        """Refuse a trained parameter that `fully_shard` did not cover: nobody would reduce its gradient over ranks."""
        held = {id(parameter) for parameter in self._held()}
        for name, parameter in self._at_attach.items():
            if id(parameter) in held and isinstance(parameter, DTensor) and not _by_rows(parameter):
                raise Unsupported(
                    f"'{name}' is placed as {parameter.placements}; what is trained may be sharded by rows, Shard(0), "
                    f"over one mesh dimension. Leave it out of shard_placement_fn."
                )
            if id(parameter) in held and not isinstance(parameter, DTensor) and dist.get_world_size() > 1:
                raise Unsupported(
                    f"'{name}' is trained but not sharded: nobody would reduce its gradient over ranks. Call "
                    f"fully_shard on the root module too, after its blocks."
                )


def _by_rows(parameter: DTensor) -> bool:
    shards = [placement for placement in parameter.placements if not isinstance(placement, Replicate)]
    return len(shards) <= 1 and all(type(placement) is Shard and placement.dim == 0 for placement in shards)


def _checked(parameter: nn.Parameter, name: str) -> DTensor:
    if not isinstance(parameter, DTensor):
        raise Unsupported(
            f"'{name}' is a plain tensor in a sharded model: nobody would reduce its gradient over ranks. Call "
            f"inject_adalora before fully_shard."
        )
    if parameter.dtype != torch.float32:
        raise Unsupported(
            f"'{name}' is {parameter.dtype}; adapters are float32 master weights. Use FSDP2's MixedPrecisionPolicy "
            f"for low-precision compute instead of casting the model."
        )
    if not _by_rows(parameter):
        raise Unsupported(
            f"'{name}' is placed as {parameter.placements}; adapters may be sharded by rows, Shard(0), over one mesh "
            f"dimension (FSDP2, HSDP). Tensor parallelism is not supported."
        )
    return parameter
