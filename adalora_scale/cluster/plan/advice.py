"""What fits: the largest micro-batch, the smallest number of GPUs, and the ways out where nothing does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

from adalora_scale.cluster.plan.memory import Memory, Model, memory_of
from adalora_scale.cluster.plan.request import Request
from adalora_scale.cluster.plan.trace import Activations
from adalora_scale.engines.registry import ENGINES

MOST_SEQUENCES = 1024
MOST_GPUS = 1024


@dataclass(frozen=True)
class Traces:
    """Activations of one and of two sequences; all sizes grow evenly with their number."""

    one: Activations
    two: Activations

    def of(self, sequences: int) -> Activations:
        """Return the activations of a micro-batch."""
        grown = {
            item.name: max(self.value(item.name, sequences), 0)  # a difference of peaks may fall
            for item in fields(Activations)
        }
        return Activations(**grown)

    def value(self, name: str, sequences: int) -> int:
        """Return one of its sizes."""
        one, two = int(getattr(self.one, name)), int(getattr(self.two, name))
        return one + (sequences - 1) * (two - one)


def largest_micro_batch(fits: Callable[[int], bool]) -> int:
    """Return the largest micro-batch that fits, 0 if none does; what fits must fit with fewer sequences too."""
    if not fits(1):
        return 0
    low, high = 1, MOST_SEQUENCES + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def smallest_cluster(
    request: Request, model: Model, traces: Callable[[str], Traces], per_node: int
) -> tuple[int, str, Memory] | None:
    """Return the fewest GPUs on which a micro-batch of one sequence fits, with the engine, or None.

    Numbers tried are powers of two within a node and whole nodes beyond.
    """
    counts = [count for count in (1, 2, 4, 8, 16, 32, 64) if count < per_node]
    nodes = 1
    while nodes * per_node <= MOST_GPUS:
        counts.append(nodes * per_node)
        nodes *= 2
    order = sorted((e.preference, name) for name, e in ENGINES.items() if e.preference is not None)
    for count in counts:
        asked = replace(request, gpus=count, nodes=max(1, count // per_node), micro_batch=1, global_batch=None)
        for _, engine in order:
            memory = memory_of(engine, asked, model, traces(engine).of(1))
            if memory.device <= request.hardware.gpu.memory:
                return count, engine, memory
    return None
