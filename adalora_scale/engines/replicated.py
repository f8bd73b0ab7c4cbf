"""One process, or DDP: every rank holds every adapter tensor whole, and gradients arrive already averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from adalora_scale.config import EngineConfig
from adalora_scale.engines.by_hand import Bench, ByHand
from adalora_scale.engines.direct import DirectSharding
from adalora_scale.engines.engine import Engine
from adalora_scale.engines.joining import JoinWatch
from adalora_scale.engines.planned import (
    GRADIENTS_COME_LAST,
    KINDS,
    Moment,
    Part,
    Traffic,
    Work,
    around,
    statistics_part,
)
from adalora_scale.engines.ranks import several_ranks
from adalora_scale.engines.span import Span, adapter_tensors, check_held, no_cuts
from adalora_scale.engines.unused import take_all_part
from adalora_scale.errors import Unsupported, UserError


class ReplicatedSharding(DirectSharding):
    """Spans that are whole tensors; sums over ranks are already there, so nothing is reduced.

    Args:
        model: the model with AdaLoRA layers.
        optimizer: the torch optimizer that updates them.

    Raises:
        UserError: the optimizer does not hold an adapter parameter.
        Unsupported: adapters are not float32, or lie on several devices, or the model is in a join context.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        if isinstance(optimizer, ZeroRedundancyOptimizer):
            raise Unsupported(
                "ZeroRedundancyOptimizer keeps Adam's moments on other ranks, where checkpoints would miss them; use "
                "DeepSpeed ZeRO-1 (engine.name=deepspeed) or fully_shard instead."
            )
        tensors = adapter_tensors(model)
        check_held(tensors, optimizer)
        for tensor, parameter in tensors:
            if parameter.dtype != torch.float32:
                raise Unsupported(
                    f"'{tensor.name}' is {parameter.dtype}; adapters are float32 master weights. Cast the base model "
                    f"before inject_adalora, not the model after it."
                )
            if parameter.shape.numel() != tensor.numel:
                raise Unsupported(
                    f"'{tensor.name}' has {parameter.shape.numel()} of its {tensor.numel} elements here: an "
                    f"engine that is not supported has split it. Use DDP, FSDP2 (fully_shard) or DeepSpeed ZeRO."
                )
            if parameter.device != tensors[0][1].device:
                raise Unsupported(
                    f"'{tensor.name}' is on {parameter.device}, other adapters on {tensors[0][1].device}; a model "
                    f"split over devices by device_map is not supported. Use one device a process."
                )
        super().__init__(model, [parameter for _, parameter in tensors], optimizer)
        self.spans = [Span(tensor=t, start=0, weight=p.detach().view(-1), shape=tuple(p.shape)) for t, p in tensors]
        self._compared = False
        take_all_part(model)
        self._join = JoinWatch(model)
        self._join.require_none()

    def updating(self, optimizer: Optimizer) -> list[int]:
        """Return the spans that the one call updates.

        Raises:
            UserError: the parameters are not those of attach any more.
            Unsupported: the step happens in a DDP join context.
        """
        self._join.require_none()
        return super().updating(optimizer)

    def connect(self) -> None:
        """Nothing to learn: this rank's spans are whole."""
        self.cuts = no_cuts(self.spans)

    def all_reduce(self, buffer: Tensor) -> None:
        """Nothing to add: every rank holds all pieces."""

    def agree(self, squares: Tensor) -> None:
        """Take the mean over ranks; at the first step, see that every rank has the same gradients."""
        if not several_ranks():
            return
        sums = torch.cat([squares, squares[:1].square()])
        dist.all_reduce(sums)
        sums /= dist.get_world_size()
        squares.copy_(sums[:2])
        if self._compared or not bool(torch.isfinite(sums).all()) or not bool(sums[0] > 0):
            return
        self._compared = True
        # The variance over ranks: rounding leaves 1e-7 of the square, batches of different data far more.
        if bool(sums[2] - sums[0].square() > 1e-4 * sums[0].square()):
            raise UserError(
                "ranks have different gradients of the adapters: nobody reduces them. Call inject_adalora before "
                "DistributedDataParallel wraps the model, and train the wrapped model."
            )

    def broadcast(self, tensor: Tensor) -> None:
        """Take rank 0's tensor on every rank."""
        if several_ranks():
            dist.broadcast(tensor, src=0)

    @torch.no_grad()
    def write(self, values: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Overwrite parameters with whole values."""
        for parameter, value in values:
            parameter.copy_(value)

    def replicas(self) -> tuple[list[tuple[str, Tensor]], dist.ProcessGroup | None]:
        """Every rank holds every trained parameter."""
        return self.held_tensors(), None


class Ddp(Engine):
    """DistributedDataParallel, wrapped by accelerate when training starts."""

    name = "ddp"
    real = "ddp"
    autocast = True
    preference: ClassVar[int | None] = 0

    @classmethod
    def asked(cls, config: EngineConfig, *, by_accelerate: bool = False) -> Ddp:
        """Return DDP, which is one process where nothing launched more."""
        if config.config is not None:
            raise UserError("engine.config says nothing to engine.name=ddp; remove it, or name another engine.")
        return Ddp()

    # ---- live objects -------------------------------------------------------------------------------------------

    @classmethod
    def recognises(cls, model: nn.Module, links: Sequence[Any]) -> bool:
        """Return true: plain tensors are what is left once every other engine was asked."""
        return True

    @classmethod
    def hold(cls, model: nn.Module, links: Sequence[Any]) -> ReplicatedSharding:
        """Return whole tensors."""
        return ReplicatedSharding(model, links[-1])

    @classmethod
    def wraps(cls, model: nn.Module) -> bool:
        """Return whether DistributedDataParallel is around the model."""
        return isinstance(model, DistributedDataParallel)

    # ---- placing ------------------------------------------------------------------------------------------------

    def allows(self, real: type[Engine], world_size: int) -> bool:
        """Return whether it is DDP, or one process that is alone."""
        return real is Ddp or (real is OneProcess and world_size == 1)

    # ---- planning -----------------------------------------------------------------------------------------------

    @classmethod
    def plain(cls, nodes: int) -> Self:
        """Return it; it has no options."""
        return cls()

    @classmethod
    def offered(cls, ranks: int, nodes: int) -> bool:
        """Return true: on one GPU it is one process."""
        return True

    def memory(self, work: Work) -> list[Part]:
        """Return everything whole, and DDP's buckets."""
        parts = []
        for kind in KINDS:
            size = sum(piece.bytes for piece in work.held if piece.kind == kind)
            parts.append(Part("adapters (fp32)" if kind == "adapters" else kind, size))
        owned = sum(piece.tensor.numel() for piece in work.held if piece.trained)
        kept: Moment = "always" if work.accumulation > 1 else "step"
        parts += [
            Part("gradients", 4 * owned, kept, GRADIENTS_COME_LAST if kept == "step" else ""),
            Part("Adam's moments", 8 * owned),
            statistics_part(work, owned),
        ]
        if work.ranks > 1:
            parts.append(Part("reduction buffers", 4 * owned, note="DDP's buckets"))
        return parts

    def traffic(self, work: Work) -> Traffic:
        """Return one all-reduce of the gradients."""
        owned = sum(piece.tensor.numel() for piece in work.held if piece.trained)
        return Traffic(0, 0, int(around(work.ranks) * 2 * 4 * owned))

    # ---- loops written by hand ----------------------------------------------------------------------------------

    def by_hand(self, bench: Bench) -> ByHand:
        """Wrap it in DistributedDataParallel."""
        return _DdpByHand(bench, DistributedDataParallel(bench.model))


class OneProcess(Ddp):
    """What holds the model of a run with engine.name=ddp that is alone."""

    real = "one process"
    preference = None

    @classmethod
    def wraps(cls, model: nn.Module) -> bool:
        """Return true: nothing is around a model that no other engine holds."""
        return True

    @classmethod
    def offered(cls, ranks: int, nodes: int) -> bool:
        """Return false: a comparison shows it as DDP."""
        return False

    @classmethod
    def trials(cls) -> dict[str, Engine]:
        """Return nothing: the other engines are compared with it."""
        return {}

    def by_hand(self, bench: Bench) -> ByHand:
        """Leave the model as it is."""
        return ByHand(bench, bench.model)


class _DdpByHand(ByHand):
    def begin(self, *, last: bool) -> None:
        self.model.require_backward_grad_sync = last
