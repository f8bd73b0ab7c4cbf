"""Counts what the hooks dispatch in every optimizer step: collectives, operations, and numbers that are read.

run_ranks(…, args=[CELL…])    CELL is engine:layers:preset; engine zero3+whole has sub-groups of DeepSpeed's own size
"""

import os
import sys
from contextlib import nullcontext
from unittest import mock

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist

from adalora_scale.engines.zero_place import Zero, Zero3
from adalora_scale.verify.engines import running
from adalora_scale.verify.problem import Problem, token_loss
from benchmarks.pricing.counting import Counter, hooks_counted
from tests.distributed.launcher import report

STEPS = 12


class LayeredProblem(Problem):
    """The random Llama with another number of equal layers."""

    layers = 2

    def base_model(self, dtype):
        from transformers import AutoModelForCausalLM

        config = super().base_model(dtype).config
        config.num_hidden_layers = self.layers
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).to(dtype)


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
        engine, _, whole = engine.partition("+")
        LayeredProblem.layers = int(layers)
        problem = LayeredProblem(model=None, device=torch.device("cpu"), ranks=ranks, preset=preset)
        model = problem.adapted_model()
        batches = problem.batches(model.config.vocab_size)
        allocations, frozen = [], []
        with (
            mock.patch.object(Zero3, "by_hand_config", Zero.by_hand_config) if whole else nullcontext(),
            hooks_counted() as counters,
            running(engine, "plain", problem, model) as runner,
        ):
            for batch in batches[:STEPS]:
                counters.append(Counter())
                runner.begin(last=True)
                runner.backward(token_loss(runner.model, batch.part(rank, ranks)) * ranks)
                runner.step(last=True)
                allocation = runner.allocator.last_allocation
                allocations.append(allocation is not None and allocation.step == runner.allocator.step)
                frozen.append(runner.allocator.frozen)
            calls = runner.allocator.sharding.calls_per_step
            slots = runner.allocator._attached().reduction.split_rows
        report(
            **{
                cell: {
                    "collectives": [counter.collectives for counter in counters],
                    "bytes": [counter.bytes for counter in counters],
                    "kernels": [counter.kernels for counter in counters],
                    "operations": [counter.operations for counter in counters],
                    "reads": [counter.reads for counter in counters],
                    "allocations": allocations,
                    "frozen": frozen,
                    "calls": calls,
                    "slots": slots,
                }
            }
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
