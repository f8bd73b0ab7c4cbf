"""Trains on an engine with tiled MLPs, and without; reports how far the adapters are from one another.

run_ranks(…, args=[CELL…])    CELL is engine:variant
"""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist

from adalora_scale.placing.tiled_mlp import tile_mlps
from adalora_scale.verify.engines import train
from adalora_scale.verify.problem import Problem
from tests.distributed.launcher import report

TILES = 3


class Tiled(Problem):
    def adapted_model(self, dtype=torch.float32):
        model = super().adapted_model(dtype)
        assert len(tile_mlps(model, TILES)) == 2
        return model


def main(*cells):
    dist.init_process_group("gloo")
    for cell in cells:
        engine, variant = cell.split(":")
        kept = {"model": None, "device": torch.device("cpu"), "ranks": dist.get_world_size(), "steps": 24}
        whole, tiled = train(engine, variant, Problem(**kept)), train(engine, variant, Tiled(**kept))
        squares = {"difference": 0.0, "norm": 0.0}
        for name, factors in whole.weights.items():
            for factor, weight in factors.items():
                squares["difference"] += float((weight - tiled.weights[name][factor]).square().sum())
                squares["norm"] += float(weight.square().sum())
        far = (squares["difference"] / squares["norm"]) ** 0.5
        report(**{cell: {"distance": far, "masks": whole.masks == tiled.masks, "allocations": len(whole.masks)}})
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
