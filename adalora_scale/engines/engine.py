"""What the package asks an engine, so that nobody compares its name.

One class an engine, registered by name in `registry.py`; an object of it is an engine with the options of a run. The
members stand in four groups: live objects (who holds this model?), placing (making a run so), planning, and loops
written by hand. What the optimizer's pieces are, step by step, is the `Sharding` that `hold` returns.

Every hand-written loop imports this room through `RankAllocator`: vendors that only a run needs (transformers' trainer,
accelerate) are imported inside the methods that use them.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

import torch
from torch import nn

from adalora_scale.config import EngineConfig
from adalora_scale.engines.by_hand import Bench, ByHand
from adalora_scale.engines.join import join_on_cpu
from adalora_scale.engines.planned import Part, Reading, Traffic, Work
from adalora_scale.engines.span import Sharding
from adalora_scale.errors import Unsupported

if TYPE_CHECKING:
    from transformers import TrainingArguments

Shard = Callable[[nn.Module], None]
"""Shards a model in place."""
Partition = Callable[[list[nn.Parameter]], None]
"""Partitions whole parameters over the ranks in place, with rank 0's values."""


class Loader(Protocol):
    """A base with its adapters on its way into memory; an engine calls the one method that says how it wants it."""

    def whole(self) -> nn.Module:
        """Load it whole on every rank."""

    def sharded(self, shard: Shard, storage: torch.device) -> nn.Module:
        """Shard it, and keep the shards on `storage`."""

    def partitioned(self, partition: Partition) -> nn.Module:
        """Partition it as it is read."""


class Engine(ABC):
    """One engine, with the options of a run."""

    name: ClassVar[str]
    """What a config's `engine.name` calls it; several engines may share a name, and their options decide which it is.
    """
    real: ClassVar[str]
    """What run.json, checkpoints, `plan` and `verify-engines` call it."""
    start: ClassVar[str | None] = None
    """The launcher without which it cannot start, also for one process; None needs none."""
    package: ClassVar[str | None] = None
    """The package that it needs beside torch and accelerate."""

    @classmethod
    @abstractmethod
    def asked(cls, config: EngineConfig, *, by_accelerate: bool = False) -> Engine:
        """Return the engine of this name that a config's section asks for.

        Args:
            config: the section; `config.config` may be None.
            by_accelerate: `accelerate launch` chose the engine, and its environment brings options.

        Raises:
            UserError: the section cannot be used.
            Unsupported: it asks for what is not supported.
        """

    # ---- live objects -------------------------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def recognises(cls, model: nn.Module, links: Sequence[Any]) -> bool:
        """Return whether this engine's kind holds the parameters that `attach` was given.

        Args:
            model: the model with adapters.
            links: what the user passed, its `.optimizer`, and so on to the torch optimizer.
        """

    @classmethod
    @abstractmethod
    def hold(cls, model: nn.Module, links: Sequence[Any]) -> Sharding:
        """Return this rank's pieces of a recognised model.

        Raises:
            UserError, Unsupported: as the engine's `Sharding`.
        """

    @classmethod
    @abstractmethod
    def wraps(cls, model: nn.Module) -> bool:
        """Return whether a model, as a trainer prepared it, is held by this very engine."""

    @classmethod
    def is_sharded(cls, model: nn.Module) -> bool:
        """Return whether the model itself owns its placement and the reduction of its gradients."""
        return False

    @classmethod
    @contextlib.contextmanager
    def accumulating(cls, model: Any) -> Iterator[None]:
        """Accumulate the gradients of a sharded model without reducing them."""
        yield

    # ---- placing ------------------------------------------------------------------------------------------------

    def allows(self, real: type[Engine], world_size: int) -> bool:
        """Return whether a run that asked for this engine may find its model held by `real`."""
        return real.name == self.name

    @classmethod
    def fixed_global_batch(cls, config: str | dict[str, Any]) -> int | None:
        """Return the global batch that the engine's own configuration fixes, if it does."""
        return None

    def settle(self, options: dict[str, Any]) -> None:  # noqa: B027  # some change nothing
        """Adapt the options of TrainingArguments.

        Raises:
            Unsupported: an option that cannot be right under this engine.
        """

    def join(self, timeout: timedelta, *, launched: int, use_cpu: bool) -> None:
        """Join the ranks where TrainingArguments would not, or would leave the timeout out.

        Args:
            timeout: of the process group.
            launched: ranks that the launcher started.
            use_cpu: the run was told to stay on the CPU.
        """
        if launched > 1 and use_cpu:
            join_on_cpu(timeout)

    def check(self, arguments: TrainingArguments) -> None:  # noqa: B027  # most have no configuration of their own
        """See that the engine's own configuration agrees with the finished arguments.

        Raises:
            UserError: naming both keys of the first value that differs.
        """

    @contextlib.contextmanager
    def loading(self) -> Iterator[Engine]:
        """Enter around loading; yields the engine as TrainingArguments has settled it."""
        yield self

    @property
    def streams(self) -> bool:
        """Whether every base that can is streamed from its files, not only one in 4 bits."""
        return False

    def sharder(self, *, device_type: str, bf16: bool) -> Shard | None:
        """Return what shards a model before it has its weights; None where wrapping it at the start of training does.

        Args:
            device_type: "cuda" or "cpu".
            bf16: whether the sharded model computes in bfloat16.
        """
        return None

    def load(self, loader: Loader, *, device: torch.device, bf16: bool) -> nn.Module:
        """Call the loader's method that puts the model where this engine wants it.

        Args:
            loader: has the model.
            device: where this rank computes.
            bf16: whether a sharded model computes in bfloat16.
        """
        return loader.whole()

    # ---- planning -----------------------------------------------------------------------------------------------

    autocast: ClassVar[bool] = False
    """Weights stay as they are and autocast makes 16-bit copies of them."""
    hooks_layers: ClassVar[bool] = False
    """Every layer is called through the engine's hooks, so that adapters call their bases (`adapted_product.py`)."""
    preference: ClassVar[int | None] = None
    """Place among the engines that are tried on a number of GPUs, least traffic first; None: not tried."""

    @classmethod
    @abstractmethod
    def plain(cls, nodes: int) -> Self:
        """Return the engine with options as this project ships them."""

    @classmethod
    def chosen_by(cls) -> str:
        """Return the name with the keys that choose the engine."""
        return f"engine.name={cls.name}"

    @classmethod
    def offered(cls, ranks: int, nodes: int) -> bool:
        """Return whether a comparison shows the engine although the run asks for another."""
        return ranks > 1

    def crosses_nodes(self, ranks: int, nodes: int) -> bool:
        """Return whether what is exchanged at every micro-batch leaves the node."""
        return nodes > 1

    @abstractmethod
    def memory(self, work: Work) -> list[Part]:
        """Return what the engine holds on the fullest rank."""

    @abstractmethod
    def traffic(self, work: Work) -> Traffic:
        """Return what a rank sends."""

    def reading(self, stored: int, largest: int, *, ranks: int, per_node: int, in_4bit: bool) -> Reading:
        """Return how the base is read.

        Args:
            stored: bytes of its files.
            largest: bytes of the largest tensor.
            ranks, per_node: of the run, and of one of its nodes.
            in_4bit: it is quantised as it is read.
        """
        return Reading(stored, largest if in_4bit else stored, per_node)

    # ---- loops written by hand ----------------------------------------------------------------------------------

    shares_everything: ClassVar[bool] = False
    """All that is held for adapters and base is divided by the number of ranks."""

    @classmethod
    def trials(cls) -> dict[str, Engine]:
        """Return name → engine with the options under which `verify-engines` runs it."""
        return {cls.real: cls.plain(1)}

    @classmethod
    def why_not(cls, ranks: int) -> str:
        """Return why it cannot run on this machine with so many ranks, or nothing."""
        return ""

    @abstractmethod
    def by_hand(self, bench: Bench) -> ByHand:
        """Wrap a model as a loop without a trainer does."""


def refuse_casts(options: dict[str, Any], name: str) -> None:
    """Refuse arguments that cast a model which is sharded.

    Raises:
        Unsupported: one of them is set.
    """
    for key in ("bf16_full_eval", "fp16_full_eval"):
        if options.get(key):
            raise Unsupported(f"training.{key} casts the model, which engine.name={name} has sharded; remove it.")
