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

from adalora_scale.adalora import layer
from adalora_scale.engines.zero_place import Zero, Zero3
from adalora_scale.verify.problem import Problem
from benchmarks.pricing.counting import Counter
from benchmarks.pricing.ranks import added
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
    ranks = dist.get_world_size()
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
        by_operations = layer.AdaLoraLayer.plain
        with (
            mock.patch.object(Zero3, "by_hand_config", Zero.by_hand_config) if whole else nullcontext(),
            mock.patch.object(layer, "adapted", side_effect=layer.adapted) as asked,
            mock.patch.object(layer.AdaLoraLayer, "plain", autospec=True, side_effect=by_operations) as plain,
        ):
            seen = added(engine, problem, STEPS)
        counters = seen.counters
        report(
            **{
                cell: {
                    "collectives": [counter.collectives for counter in counters],
                    "bytes": [counter.bytes for counter in counters],
                    "kernels": [counter.kernels for counter in counters],
                    "operations": [counter.operations for counter in counters],
                    "reads": [counter.reads for counter in counters],
                    "allocations": seen.allocated,
                    "frozen": seen.frozen,
                    "calls": seen.calls,
                    "slots": seen.split_rows,
                    "forwards": [asked.call_count - plain.call_count, plain.call_count],
                }
            }
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
