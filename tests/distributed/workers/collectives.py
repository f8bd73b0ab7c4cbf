"""Counts what the hooks dispatch in every optimizer step: collectives, and kernels that are not views.

run_ranks(…, args=[CELL…])    CELL is engine:layers:preset
"""

import os
import sys
from unittest import mock

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adalora_scale.controller import RankAllocator
from adalora_scale.verify.engines import running
from adalora_scale.verify.problem import Problem, token_loss
from tests.distributed.launcher import report

STEPS = 12


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.collectives = self.kernels = self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.collectives += 1
            self.bytes += sum(t.nbytes for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor))
        elif not function.is_view:
            self.kernels += 1
        return function(*args, **(kwargs or {}))


class LayeredProblem(Problem):
    """The random Llama with another number of equal layers."""

    layers = 2

    def base_model(self, dtype):
        from transformers import AutoModelForCausalLM

        config = super().base_model(dtype).config
        config.num_hidden_layers = self.layers
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype)


def counted(hook, counters):
    def wrapper(self, optimizer, args, kwargs):
        with counters[-1]:
            hook(self, optimizer, args, kwargs)

    return wrapper


def main(*cells):
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    probe = Counter()
    with probe:
        dist.all_reduce(torch.ones(1))
        dist.broadcast(torch.ones(1), src=0)
    report(probe=[probe.collectives, probe.bytes])
    for cell in cells:
        engine, layers, preset = cell.split(":")
        LayeredProblem.layers = int(layers)
        problem = LayeredProblem(model=None, device=torch.device("cpu"), ranks=ranks, preset=preset)
        model = problem.adapted_model()
        batches = problem.batches(model.config.vocab_size)
        counters, allocations = [], []
        with (
            mock.patch.object(RankAllocator, "_before_update", counted(RankAllocator._before_update, counters)),
            mock.patch.object(RankAllocator, "_after_update", counted(RankAllocator._after_update, counters)),
            running(engine, "plain", problem, model) as runner,
        ):
            for batch in batches[:STEPS]:
                counters.append(Counter())
                runner.begin(last=True)
                runner.backward(token_loss(runner.model, batch.part(rank, ranks)) * ranks)
                runner.step(last=True)
                allocation = runner.allocator.last_allocation
                allocations.append(allocation is not None and allocation.step == runner.allocator.step)
            calls = runner.allocator._sharding.calls_per_step
            slots = runner.allocator._reduction.split_rows
        report(
            **{
                cell: {
                    "collectives": [counter.collectives for counter in counters],
                    "bytes": [counter.bytes for counter in counters],
                    "kernels": [counter.kernels for counter in counters],
                    "allocations": allocations,
                    "calls": calls,
                    "slots": slots,
                }
            }
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
