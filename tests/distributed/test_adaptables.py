"""Adapters on embeddings and convolutions on real ranks."""

from pathlib import Path

import pytest
import torch

from tests.distributed.launcher import run_ranks
from tests.distributed.workers import adaptables

WORKER = Path(__file__).parent / "workers" / "adaptables.py"
ENGINES = ["fsdp2", "zero2", "zero3"]


@pytest.mark.shows("features", feature="embeddings and convolutions adapted", engine=("one process", *ENGINES))
def test_two_ranks_equal_one_process(deepspeed_ops):
    """Else embeddings and convolutions learn something else as soon as their factors are sharded."""
    weights, mask = adaptables.train("single")
    rows = {name.removesuffix(".lora_A"): len(value) for name, value in weights.items() if name.endswith("lora_A")}
    costs = [rows[name] + len(weights[f"{name}.lora_B"]) + 1 for name in rows]
    kept = torch.tensor(mask).view(len(rows), -1).sum(1).tolist()
    spent = sum(rank * cost for rank, cost in zip(kept, costs, strict=True))
    assert 2 * sum(costs) - max(costs) < spent <= 2 * sum(costs)
    outputs = run_ranks(WORKER, 2, ENGINES, timeout=300)
    for engine in ENGINES:
        for output in outputs:
            assert output[engine]["mask"] == mask, engine
            for name, expected in weights.items():
                got, expected = torch.tensor(output[engine]["weights"][name]), torch.tensor(expected)
                assert (got - expected).norm() <= 1e-4 * max(expected.norm().item(), 1e-3), (engine, name)
