"""Cells of the equivalence matrix on real ranks, right ones and mutants that the criterion must refuse.

run_ranks(…, args=[MODEL, "4" or "16" bits, PRESET, EXPECTED or "none", CELL…])

MODEL is a folder, "random" or "experts", the latter with ":" and a number of steps or not; CELL is
engine:variant[:mutant].
"""

import contextlib
import os
import sys
from unittest import mock

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from adalora_scale.controller import RankAllocator
from adalora_scale.controller.rows import SplitRows
from adalora_scale.controller.step_sums import StepReduction
from adalora_scale.controller.triplets import Triplets
from adalora_scale.engines.fsdp2 import DTensorSharding
from adalora_scale.engines.zero import ZeroSharding
from adalora_scale.errors import Unsupported, UserError
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.quantization.experts import ExpertLinear4bit
from adalora_scale.verify.engines import train
from adalora_scale.verify.margins import Margins
from adalora_scale.verify.matrix import expected_outcomes, judge, why_not
from adalora_scale.verify.problem import Problem
from tests.distributed.launcher import report

SHARDINGS = (ZeroSharding, DTensorSharding)


@contextlib.contextmanager
def all_reduce_replaced(replace):
    with contextlib.ExitStack() as stack:
        for kind in SHARDINGS:
            original = kind.all_reduce
            stack.enter_context(
                mock.patch.object(kind, "all_reduce", lambda self, buffer, f=original: replace(f, self, buffer))
            )
        yield


@contextlib.contextmanager
def scores_of_rank_1_left_out():
    """The last rank to matter: its triplets' scores count as zero."""

    def without_one(all_reduce, sharding, buffer):
        if in_scores and dist.get_rank() == 1:
            buffer.zero_()
        all_reduce(sharding, buffer)

    in_scores = []
    original = RankAllocator._scores

    def scores(self):
        in_scores.append(True)
        try:
            return original(self)
        finally:
            in_scores.clear()

    with all_reduce_replaced(without_one), mock.patch.object(RankAllocator, "_scores", scores):
        yield


@contextlib.contextmanager
def gram_not_reduced():
    """Every rank regularises with the Gram of its own rows."""
    original = StepReduction.run

    def run(self, squares, keep):
        with all_reduce_replaced(lambda all_reduce, sharding, buffer: None):
            return original(self, squares, keep)

    with mock.patch.object(StepReduction, "run", run):
        yield


@contextlib.contextmanager
def lambda_zeroed_in_the_copy_only():
    """The mask reaches the weights the forward uses and not the masters, as PEFT's does under ZeRO."""

    attached = []
    original = RankAllocator.attach

    def attach(self, target):
        attached.append(self)
        return original(self, target)

    def zero(self, mask):
        layers = attached[-1]._layers
        rows = mask.split([layer.lora_E.numel() for layer in layers])
        for layer, row in zip(layers, rows, strict=True):
            layer.lora_E.mul_(row.view(layer.lora_E.shape))

    with (
        mock.patch.object(RankAllocator, "attach", attach),
        mock.patch.object(Triplets, "zero_lambda", zero),
    ):
        yield


@contextlib.contextmanager
def masters_not_published():
    """Groups that DeepSpeed stepped and copied before the last one keep the λ that the mask removes."""
    with mock.patch.object(ZeroSharding, "publish", lambda self: None):
        yield


@contextlib.contextmanager
def split_rows_ignored():
    """Rows that two ranks hold halves of are left out of Gram and gradient."""
    with (
        mock.patch.object(SplitRows, "write", lambda self, out, weights: None),
        mock.patch.object(SplitRows, "put", lambda self, out, products: out.index_fill_(0, self.elements, 0.0)),
    ):
        yield


@contextlib.contextmanager
def one_scale_of_an_expert_wrong():
    """One block of 64 weights of an expert has another scale in what the last rank holds."""
    original = RankAllocator.attach

    def attach(self, target):
        result = original(self, target)
        if dist.get_rank() == dist.get_world_size() - 1:
            own = held(next(m for m in self.model.modules() if isinstance(m, ExpertLinear4bit)).scales)
            own[0] ^= 16
        return result

    with mock.patch.object(RankAllocator, "attach", attach):
        yield


def held(parameter):
    """This rank's piece of a frozen parameter."""
    if isinstance(parameter, DTensor):
        return parameter.to_local().view(-1)
    return parameter.ds_tensor.view(-1) if hasattr(parameter, "ds_tensor") else parameter.data.view(-1)


MUTANTS = {
    "": contextlib.nullcontext,
    "scores": scores_of_rank_1_left_out,
    "gram": gram_not_reduced,
    "copy": lambda_zeroed_in_the_copy_only,
    "publish": masters_not_published,
    "rows": split_rows_ignored,
    "scale": one_scale_of_an_expert_wrong,
}


@contextlib.contextmanager
def shapes_seen(shapes):
    """Record what really was hard about a cell: split rows, empty spans, several calls of the optimizer a step; of a
    mixture also how many layers of experts are in 4 bits and in 16, how far routing is from ties, who was reached."""
    original, watched = RankAllocator.attach, contextlib.ExitStack()

    def attach(self, target):
        result = original(self, target)
        sharding = self.sharding
        empty = torch.tensor(sum(span.weight.numel() == 0 for span in sharding.spans))
        dist.all_reduce(empty)
        shapes.update(
            split_rows=self._attached().reduction.split_rows,
            empty_spans=int(empty),
            calls=sharding.calls_per_step,
        )
        kinds = [type(module) for module in self.model.modules()]
        if any(experts := (kinds.count(ExpertLinear4bit), kinds.count(ExpertLinear))):
            shapes["experts"] = experts
            margins = watched.enter_context(Margins(self.model))
            watched.callback(lambda: shapes.update(margin=margins.smallest, reached=sorted(margins.reached)))
        return result

    with mock.patch.object(RankAllocator, "attach", attach), watched:
        yield


def main(model, bits, preset, expected_file, *cells):
    dist.init_process_group("gloo")
    experts, _, steps = model.partition(":") if model.startswith("experts") else ("", "", "")
    problem = Problem(
        model=None if model == "random" or experts else model,
        experts="mixtral" if experts else None,
        steps=int(steps or 60),
        device=torch.device("cpu"),
        ranks=dist.get_world_size(),
        load_in_4bit=bits == "4",
        preset=preset,
    )
    cells = [[*cell.split(":"), ""][:3] for cell in cells]
    if expected_file == "none":
        expected = expected_outcomes([variant for _, variant, _ in cells], problem)
    else:
        expected = torch.load(expected_file, weights_only=False)
    for engine, variant, mutant in cells:
        if reason := why_not(engine, variant, problem):
            raise RuntimeError(f"{engine} cannot run here: {reason}")
        shapes = {}
        name = ":".join(filter(None, (engine, variant, mutant)))
        try:
            with MUTANTS[mutant](), shapes_seen(shapes):
                outcome = train(engine, variant, problem)
        except (Unsupported, UserError) as refusal:  # masters that the forward does not compute with are not read
            report(**{name: {"verdict": "fail", "reason": str(refusal)} | shapes})
            continue
        cell = judge(engine, variant, outcome, expected[variant])
        report(**{name: cell.as_dict() | shapes})
        if dist.get_rank() == 0:
            print(cell, shapes, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
