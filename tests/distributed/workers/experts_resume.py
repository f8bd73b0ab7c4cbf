"""A mixture of experts on an engine: trained with checkpoints on the way, or gone on with from one of another run.

run_ranks(…, args=[ENGINE, PRESET, FOLDER, EXPECTED, "start" or a step, "wide" or "compact"])
"""

import hashlib
import os
import sys
from pathlib import Path

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist

from adalora_scale.checkpoint.finding import find_checkpoint
from adalora_scale.checkpoint.state import scatter
from adalora_scale.engines.full import full_parameter
from adalora_scale.training.checkpointing import compact_for
from adalora_scale.verify.engines import running
from adalora_scale.verify.matrix import distances
from adalora_scale.verify.problem import Problem, adapter_weights, token_loss
from tests.distributed.launcher import report
from tests.distributed.workers.checkpoint_worker import write

STEPS, DURING, AFTER = 24, 10, 20
"""tinit is 2, the final allocation 18."""


def problem_of(preset, ranks):
    return Problem(model=None, experts="mixtral", device=torch.device("cpu"), ranks=ranks, steps=STEPS, preset=preset)


def main(engine, preset, folder, expected, start, built):
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    folder, expected, problem = Path(folder), torch.load(expected, weights_only=False), problem_of(preset, ranks)
    model = problem.adapted_model(torch.float32)
    first, masks = 0, {}
    if start != "start":
        checkpoint, first = find_checkpoint(str(folder / f"checkpoint-{start}"), folder), int(start)
        compact = compact_for(checkpoint, model, asked=built == "compact", exact=True)
        assert compact == (built == "compact")
    widths = {layer.shape[-1] for own in adapter_weights(model).values() for layer in own.values()}
    with running(engine, "plain", problem, model) as runner:
        allocator = runner.allocator
        if start != "start":
            scatter(checkpoint, model, allocator.sharding, allocator)
        for number, batch in enumerate(problem.batches(256)[first:], start=first + 1):
            runner.begin(last=True)
            runner.backward(token_loss(runner.model, batch.part(rank, ranks)) * ranks)
            runner.step(last=True)
            if (last := allocator.last_allocation) is not None and last.step == number:
                masks[number] = {key.removesuffix(".lora_E"): row for key, row in allocator.rank_pattern().items()}
            if start == "start" and number in (DURING, AFTER):
                write(folder, runner, model, number)
        weights = {
            name: {f: full_parameter(w, model).float().cpu().clone() for f, w in own.items()}
            for name, own in adapter_weights(model).items()
        }
    digest = hashlib.sha256()
    for own in weights.values():
        for value in own.values():
            digest.update(value.numpy().tobytes())
    figures = {}
    if built == "wide":
        figures["together"], figures["worst"], _ = distances(weights, expected.weights)
    sums = sum(w.double().square().sum().item() for own in weights.values() for w in own.values())
    due = {step: mask for step, mask in expected.masks.items() if step > first}
    report(
        **figures,
        masks=masks == due,
        digest=digest.hexdigest(),
        squares=sums,
        widths=len(widths),
        spent=allocator.spent,
    )
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*[argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")])
