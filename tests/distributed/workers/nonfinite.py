"""NaN in one rank's shard only, momentum non-zero, clipping off: what changed, on this rank.

run_ranks(…, args=[CELL…])    CELL is engine:variant, or engine:variant:last for a run whose last step is the bad one
"""

import os
import sys

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from adalora_scale.engines.full import full_parameter
from adalora_scale.verify.engines import running
from adalora_scale.verify.problem import Problem, adapter_weights, token_loss
from tests.distributed.launcher import report


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def snapshot(runner):
    """Copies of everything a step may change on this rank, by kind."""
    allocator = runner.allocator
    states = [value for state in runner.optimizer.state.values() for value in state.values()]
    return {
        "weights": [span.weight.clone() for span in allocator.sharding.spans],
        "moments": [local(value).clone() for value in states if isinstance(value, torch.Tensor)],
        **{name: [tensor.clone() for tensor in tensors] for name, tensors in allocator.statistics.items()},
    }


def poison(engine, runner):
    """Put NaN into the reduced gradient of one rank, in the last group that the optimizer is going to be given."""
    if dist.get_rank() != 1:
        return
    if engine in ("ddp", "fsdp2", "hsdp"):
        own = [local(p.grad) for group in runner.optimizer.param_groups for p in group["params"]]
        next(piece for piece in reversed(own) if piece.numel())[0] = float("nan")
    else:
        waiting = runner.model.optimizer.averaged_gradients
        pieces = [piece for piece in waiting[max(waiting)] if piece is not None and piece.numel()]
        pieces[-1].view(-1)[0] = float("nan")


def steps(runner, batches, rank, ranks):
    for batch in batches:
        runner.begin(last=True)
        runner.backward(token_loss(runner.model, batch.part(rank, ranks)) * ranks)
        runner.step(last=True)


class ToTheEnd(Problem):
    """The final allocation falls on the last step."""

    @property
    def config(self):
        return super().config.replace(tfinal=0)


def last_step(engine, variant, rank, ranks):
    """Poison the last step; what is left in masters and in the weights that the forward computes with."""
    problem = ToTheEnd(model=None, device=torch.device("cpu"), ranks=ranks, steps=24)
    model = problem.adapted_model(torch.bfloat16 if variant == "bf16" else torch.float32)
    *batches, last = problem.batches(model.config.vocab_size)
    with running(engine, variant, problem, model) as runner:
        steps(runner, batches, rank, ranks)
        runner.begin(last=True)
        runner.backward(token_loss(runner.model, last.part(rank, ranks)) * ranks)
        poison(engine, runner)
        runner.step(last=True)
        runner.allocator.skip_missed_steps(problem.steps)
        lambdas = [weights["E"] for weights in adapter_weights(model).values()]
        masters = sum(int((full_parameter(weight, model) != 0).sum()) for weight in lambdas)
        copies = None
        if engine.startswith("zero"):
            copies = sum(int((weight.detach() != 0).sum()) for weight in lambdas)
        allocator = runner.allocator
        return {
            "frozen": allocator.frozen, "kept": int(allocator.mask.sum()), "spent": allocator.spent,
            "budget": allocator.schedule.target_budget,
            "masters": masters, "copies": copies, "digest": allocator.masks_digest(), "step": allocator.step,
        }  # fmt: skip


def main(*cells):
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    problem = Problem(model=None, device=torch.device("cpu"), ranks=ranks, preset="paper")
    for cell in cells:
        engine, variant, *last = cell.split(":")
        if last:
            report(**{cell: last_step(engine, variant, rank, ranks)})
            continue
        model = problem.adapted_model(torch.bfloat16 if variant == "bf16" else torch.float32)
        batches = problem.batches(model.config.vocab_size)
        with running(engine, variant, problem, model) as runner:
            steps(runner, batches[:3], rank, ranks)
            before = snapshot(runner)
            runner.begin(last=True)
            loss = token_loss(runner.model, batches[3].part(rank, ranks)) * ranks
            # BF16_Optimizer reduces whole gradients: one rank's NaN is everyone's before the optimizer sees it.
            whole = cell == "zero1:bf16"
            runner.backward(loss * float("nan") if whole and rank == 1 else loss)
            if not whole:
                poison(engine, runner)
            runner.step(last=True)
            after = snapshot(runner)
            steps(runner, batches[4:6], rank, ranks)
            later = snapshot(runner)
        report(
            **{
                cell: {
                    "changed": [k for k in before if not all(map(torch.equal, before[k], after[k]))],
                    "unchanged_later": [k for k in after if all(map(torch.equal, after[k], later[k]))],
                    "not_finite": [k for k in later if not all(bool(t.isfinite().all()) for t in later[k])],
                    "momentum": sum(tensor.abs().sum().item() for tensor in before["moments"]),
                    "step": runner.allocator.step,
                    "skipped": runner.allocator.skipped_steps,
                }
            }
        )
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
