"""Every expert is a matrix with triplets of its own: in the budget, the masks, the penalty, and after pruning."""

from __future__ import annotations

import pytest
import torch

from adalora_scale.adalora.compaction import columns, compact, held_triplets, width
from adalora_scale.adalora.injection import adapter_layers
from adalora_scale.adalora.matrices import matrix_names
from adalora_scale.checkpoint.finding import find_checkpoint
from adalora_scale.checkpoint.state import masks_of, scatter
from adalora_scale.training.checkpointing import compact_for
from adalora_scale.verify.engines import SINGLE, running, train
from adalora_scale.verify.margins import Margins
from adalora_scale.verify.matrix import ALL_TOLERANCE, TENSOR_TOLERANCE, distances, expected_outcome
from adalora_scale.verify.mixture import CLASSES, EXPERTS
from adalora_scale.verify.problem import Problem, adapter_weights, token_loss
from tests.distributed.workers.checkpoint_worker import write

STEPS, FINAL, SAVED = 24, 18, 20
R, TARGET = 6, 4


def problem_of(preset="paper", bits=16, **options):
    return Problem(
        model=None, experts="mixtral", device=torch.device("cpu"), ranks=1, steps=STEPS, preset=preset, options=options,
        load_in_4bit=bits == 4,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("preset", "bits"),
    [("paper", 16), *(pytest.param(*cell, marks=pytest.mark.full) for cell in (("default", 16), ("paper", 4)))],
)
def test_one_process_equals_the_reference(preset, bits, monkeypatch):
    """Else an expert's triplets are another's, or a token near a tie decides what engines are compared by."""
    problem = problem_of(preset, bits)
    expected = expected_outcome("plain", problem)
    model = problem.adapted_model()
    monkeypatch.setattr(Problem, "adapted_model", lambda self, dtype: model)
    with Margins(model) as margins:
        outcome = train(SINGLE, "plain", problem)
    assert outcome.masks == expected.masks and len(outcome.masks) >= 10
    together, worst, name = distances(outcome.weights, expected.weights)
    assert together <= ALL_TOLERANCE and worst <= TENSOR_TOLERANCE, name
    assert margins.smallest > 0.2  # of the largest probability; engines differ by 1e-6
    assert margins.reached == set(range(CLASSES)) and CLASSES < EXPERTS
    last = outcome.masks[FINAL]
    experts = [name for name, layer in adapter_layers(model) if layer.matrices > 1]
    assert len(experts) == 4 and all(len(last[name]) == EXPERTS * R for name in experts)
    kept = {sum(last[name][n * R : (n + 1) * R]) for name in experts for n in range(EXPERTS)}
    assert len(kept) > 2  # experts of one layer differ


def steps(runner, problem, first, last):
    for batch in problem.batches(256)[first:last]:
        runner.backward(token_loss(runner.model, batch))
        runner.step(last=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(problem, folder of the checkpoint of step 20, the run's adapter at its end and what its allocator says)."""
    problem, folder = problem_of(budget_unit="params"), tmp_path_factory.mktemp("experts")
    model = problem.adapted_model()
    with running(SINGLE, "plain", problem, model) as runner:
        steps(runner, problem, 0, SAVED)
        write(folder, runner, model, SAVED)
        steps(runner, problem, SAVED, STEPS)
        weights = {n: {f: w.detach().clone() for f, w in own.items()} for n, own in adapter_weights(model).items()}
        yield problem, folder, weights, runner.allocator


def test_names_ranks_budget_and_masks_are_of_matrices(saved):
    """Else records, reports and the budget count a layer of experts as one matrix."""
    _, _, _, allocator = saved
    layers = dict(adapter_layers(allocator.model))
    assert matrix_names("a.experts.up", 2) == ["a.experts.0.up", "a.experts.1.up"] and matrix_names("a", 1) == ["a"]
    assert "model.layers.1.mlp.experts.4.down_proj" in allocator.matrices
    assert len(allocator.matrices) == sum(layer.matrices for layer in layers.values()) == 8 + 4 * EXPERTS
    assert list(allocator.ranks()) == allocator.matrices == list(allocator.last_allocation.ranks)
    one_of_each = sum(layer.matrices * layer.triplet_size for layer in layers.values())
    assert allocator.schedule.init_budget == R * one_of_each
    assert allocator.budget == allocator.schedule.target_budget == TARGET * one_of_each
    spent = sum(r * layers[n].triplet_size for n in layers for m, r in allocator.ranks().items()
                if m in matrix_names(n, layers[n].matrices))  # fmt: skip
    assert allocator.spent == spent == allocator.metrics()["adalora/spent"] <= allocator.budget
    assert spent > 0.95 * allocator.budget
    pattern = allocator.rank_pattern()
    for name, layer in layers.items():
        assert layer.keep_mask == pattern[f"{name}.lora_E"] and len(layer.keep_mask) == layer.matrices * R
        ranks = [allocator.ranks()[each] for each in matrix_names(name, layer.matrices)]
        assert ranks == torch.tensor(layer.keep_mask).view(layer.matrices, R).sum(1).tolist()


def test_built_at_pruned_ranks_a_run_ends_with_the_same_adapter(saved, tmp_path):
    """Else going on in fewer columns changes experts, counts padding, or cannot go back."""
    problem, folder, weights, allocator = saved
    checkpoint = find_checkpoint(str(folder / f"checkpoint-{SAVED}"), folder)
    model = problem.adapted_model()
    assert compact_for(checkpoint, model, asked=True, exact=False)
    layers, masks = dict(adapter_layers(model)), masks_of(checkpoint.manifest["allocator"])
    with torch.no_grad():
        for layer in layers.values():
            for factor in ("lora_A", "lora_E", "lora_B"):
                getattr(layer, factor).fill_(7.0)  # what was not loaded would show
    with running(SINGLE, "plain", problem, model) as runner:
        scatter(checkpoint, model, runner.allocator.sharding, runner.allocator)
        assert runner.allocator.compact and not runner.allocator._columns_may_move
        write(tmp_path, runner, model, SAVED)
        steps(runner, problem, SAVED, STEPS)
        assert runner.allocator.ranks() == allocator.ranks() and runner.allocator.spent == allocator.spent
        assert runner.allocator.metrics()["adalora/orth_loss"] == pytest.approx(
            allocator.metrics()["adalora/orth_loss"]
        )
    padded = 0
    for name, layer in layers.items():
        n, kept = layer.matrices, columns(masks[name], layer.matrices, layer.r)
        assert layer.r == width(masks[name], n)
        for factor, wide in weights[name].items():
            narrow = getattr(layer, f"lora_{factor}").detach()
            for m, triplets in enumerate(kept):
                own, whole = narrow.reshape(n, -1, layer.r)[m], wide.reshape(n, -1, R)[m]
                for column, triplet in enumerate(triplets):
                    if triplet is None:
                        padded += 1
                        assert not own[:, column].any()
                    else:
                        torch.testing.assert_close(own[:, column], whole[:, triplet], rtol=1e-4, atol=1e-6)
        assert sum(held_triplets(layer)) == sum(masks[name])
    assert padded
    back = problem.adapted_model()  # and from fewer columns to all of them
    with running(SINGLE, "plain", problem, back) as runner:
        scatter(find_checkpoint(str(tmp_path / f"checkpoint-{SAVED}"), tmp_path), back, runner.allocator.sharding,
                runner.allocator)  # fmt: skip
        steps(runner, problem, SAVED, STEPS)
        for name, own in adapter_weights(back).items():
            for factor, value in own.items():
                assert value.detach().equal(weights[name][factor]), (name, factor)


class Restless(torch.optim.Optimizer):
    """Moves every element at every step and keeps nothing that can be seen, as 8-bit optimizers with their codes."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for parameter in self.param_groups[0]["params"]:
            parameter.add_(0.01)


def test_columns_beyond_an_expert_s_rank_stay_zero_under_any_optimizer(saved):
    """Else triplets that were never paid for come to life."""
    from adalora_scale.controller import RankAllocator

    problem, folder, _, _ = saved
    masks = masks_of(find_checkpoint(str(folder / f"checkpoint-{SAVED}"), folder).manifest["allocator"])
    kinds = {
        "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
        "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9),
        "restless": Restless,
    }
    for kind, make in kinds.items():
        model = problem.adapted_model()
        compact(model, masks)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = make(trained)
        RankAllocator(model, problem.config, total_step=STEPS).attach(optimizer)
        before = [p.detach().clone() for p in trained]
        for batch in problem.batches(256)[:2]:
            token_loss(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not any(torch.equal(p, old) for p, old in zip(trained, before, strict=True) if p.dim() == 2), kind
        for layer in (layer for _, layer in adapter_layers(model) if layer.r):
            held = torch.tensor(held_triplets(layer)).view(layer.matrices, 1, layer.r)
            for factor in ("lora_A", "lora_E", "lora_B"):
                value = getattr(layer, factor).detach().reshape(layer.matrices, -1, layer.r)
                assert not (value * ~held).any(), (kind, factor)


def test_a_layer_whose_widest_expert_keeps_all_stays_as_it_is():
    """Else a mask of as many triplets as columns would not say which column is which."""
    problem = problem_of()
    model = problem.adapted_model()
    layers = dict(adapter_layers(model))
    name = "model.layers.0.mlp.experts.down_proj"
    masks = {n: [True] * R * layer.matrices for n, layer in layers.items()}
    masks[name] = [False, True] * (R // 2) + [True] * R * (EXPERTS - 1)
    masks["model.layers.1.mlp.experts.down_proj"] = [False] * R * EXPERTS
    before = layers[name].lora_B.detach().clone()
    compact(model, masks)
    assert layers[name].r == R and torch.equal(layers[name].lora_B, before)
    assert held_triplets(layers[name]) == masks[name]
    assert layers["model.layers.1.mlp.experts.down_proj"].r == 0
    assert columns([True, False, True, False], 2, 1) == [[0], [0]]
    assert columns([True, True, False, False], 2, 2) == [[0, 1], [0, 1]]
    assert columns([False, True, False] + [False] * 3, 2, 1) == [[1], [None]]
    assert columns([False, True, False] + [False] * 3, 2, 2) is None
