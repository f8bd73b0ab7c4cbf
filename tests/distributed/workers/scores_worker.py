"""Runs of one score on ranks: how each compares with the float64 reference, and the last step's figures.

run_ranks(…, args=[PRESET, ENGINE…])
"""

import os
import sys
from unittest import mock

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist

from adalora_scale.controller import RankAllocator
from adalora_scale.verify.engines import train
from adalora_scale.verify.matrix import expected_outcomes, judge
from adalora_scale.verify.problem import Problem
from tests.distributed.launcher import report


def main(score, *engines):
    dist.init_process_group("gloo")
    ranks = dist.get_world_size()
    # With a penalty beside it, and budgets in triplets; as the default has it: the equivalence matrix.
    problem = Problem(
        model=None, device=torch.device("cpu"), ranks=ranks, steps=30, preset="paper", options={"score": score}
    )
    expected = expected_outcomes(["plain"], problem)["plain"]
    attached = []
    original = RankAllocator.attach

    def attach(self, target):
        attached.append(self)
        return original(self, target)

    for engine in engines:
        with mock.patch.object(RankAllocator, "attach", attach):
            outcome = train(engine, "plain", problem)
        cell = judge(engine, "plain", outcome, expected)
        allocator = attached[-1]
        shape = {"calls": allocator.sharding.calls_per_step, "ratio": allocator.metrics()["adalora/orth_grad_ratio"]}
        report(**{engine: cell.as_dict() | shape | {"last_mask": list(outcome.masks.values())[-1]}})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
