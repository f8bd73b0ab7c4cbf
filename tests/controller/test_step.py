"""The package's AdaLoRA step against the plain float64 reference: same masks, same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.adalora.scores.sensitivity_uncertainty import SensitivityUncertainty
from adalora_scale.adalora.scores.taylor import Taylor
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.controller.step_sums import StepReduction
from adalora_scale.verify.problem import reference_options
from adalora_scale.verify.reference import ReferenceAdaLora
from tests.toy import Toy, adapters_of, relative_distance

STEPS = 60


class Uneven(Toy):
    """Matrices of three sizes."""

    def __init__(self):
        super().__init__()
        for index, block in enumerate(self.blocks):
            wide = 16 * (index * index + 1)
            block["up"], block["down"] = torch.nn.Linear(24, wide), torch.nn.Linear(wide, 24, bias=False)


def loss_of(model, ids):
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def train_pair(toy, batches, *, accumulation=1, clip=None, fused=None, **options):
    """Train the package and the reference on the same batches; return (allocator, model, reference, masks)."""
    config = AdaLoraConfig(
        **{
            "init_r": 6, "target_r": 4, "lora_alpha": 12, "tinit": 5, "tfinal": 15, "deltaT": 3,
            "orth_reg_weight": 0.3, **options,
        }
    )  # fmt: skip
    base = copy.deepcopy(toy).double()
    model = inject_adalora(toy, config)
    reference = ReferenceAdaLora(
        adapters_of(model),
        reference_options(config, STEPS, lr=5e-3, weight_decay=0.01, max_grad_norm=clip),
    )
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=5e-3, weight_decay=0.01, fused=fused)
    allocator = RankAllocator(model, config, total_step=STEPS).attach(optimizer)
    masks = {}
    for ids in batches[:STEPS]:
        reference.train_step(base, lambda call, ids=ids: F.cross_entropy(
            call(ids=ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()))  # fmt: skip
        for part in ids.chunk(accumulation):
            (loss_of(model, part) / accumulation).backward()
        if clip:
            torch.nn.utils.clip_grad_norm_(trainable, clip)
        optimizer.step()
        optimizer.zero_grad()
        if allocator.last_allocation and allocator.last_allocation.step == allocator.step:
            masks[allocator.step] = {k.removesuffix(".lora_E"): v for k, v in allocator.rank_pattern().items()}
    return allocator, model, reference, masks


@pytest.mark.shows("features", feature="a loop of your own", engine="one process")
@pytest.mark.shows(
    "features",
    feature="gradient clipping",
    engine=lambda given: "one process" if "clip" in given["options"] else None,
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "paper"},
        {"preset": "peft"},
        {"score": "taylor"},
        {"score": "sensitivity_uncertainty"},
        {"score": "sensitivity_uncertainty", "init_weights": "adalora"},
        {"score": "sensitivity"},
        {"score": "magnitude"},
        {"score": "taylor", "clip": 0.05, "accumulation": 4},
        {"orth_reg_weight": 0.0},
        {"clip": 0.05},
        {"accumulation": 4},
        {"deltaT": 1, "tinit": 0, "tfinal": 0},
        {"fused": True},
    ],
    ids=str,
)
def test_masks_and_weights_equal_the_reference(toy, batches, options):
    """A wrong importance, schedule, penalty, order of operations or moment would part the two runs."""
    allocator, model, reference, masks = train_pair(toy, batches, **options)
    assert len(masks) >= 10
    assert masks == reference.masks
    together, worst = relative_distance(model, reference)
    assert together <= 1e-5
    assert worst <= 5e-5
    assert allocator.frozen
    assert sum(allocator.ranks().values()) == 4 * 6
    assert len(set(allocator.ranks().values())) > 1  # a uniform allocation would prove nothing


@pytest.mark.parametrize("unit", ["params", "triplets"])
@pytest.mark.parametrize("score", ["sensitivity_uncertainty", "taylor"])
@pytest.mark.parametrize("start", ["lora", "adalora"])
def test_matrices_of_other_sizes_equal_the_reference(batches, unit, score, start):
    """Else wide matrices are free, and the adapter has more parameters than LoRA of rank target_r."""
    torch.manual_seed(0)
    options = {"budget_unit": unit, "score": score, "init_weights": start, "orth_reg_weight": 0.0, "init_r": 8}
    allocator, model, reference, masks = train_pair(Uneven(), batches, **options)
    assert masks == reference.masks and len(masks) >= 10
    together, worst = relative_distance(model, reference)
    assert together <= 1e-5 and worst <= 5e-5
    layers = {name: layer.in_features + layer.out_features + 1 for name, layer in adapter_layers(model)}
    for step, mask in masks.items():
        cost = {name: size if unit == "params" else 1 for name, size in layers.items()}
        spent = sum(sum(row) * cost[name] for name, row in mask.items())
        assert spent <= reference.budgets[step] == allocator.schedule.budget(step)
        left_out = [cost[name] for name, row in mask.items() if not all(row)]
        assert not left_out or reference.budgets[step] < spent + min(left_out)
    assert len(set(allocator.ranks().values())) > 1
    assert allocator.metrics()["adalora/spent"] == spent
    if unit == "params":
        assert spent > 0.97 * 4 * sum(layers.values()) and spent <= 4 * sum(layers.values())


def test_the_lora_start_moves_what_lora_moves(toy, batches):
    """Else LoRA's learning rates mean something else here: at step 1 only B moves, by LoRA's gradient."""
    config = AdaLoraConfig(init_r=4, target_r=2, lora_alpha=8, init_weights="lora", orth_reg_weight=0.0)
    plain = copy.deepcopy(toy)
    model = inject_adalora(toy, config)
    assert torch.equal(model(batches[0]), plain(batches[0]))
    loss_of(model, batches[0]).backward()
    for name, layer in adapter_layers(model):
        assert layer.scaling == 8 / 2
        assert layer.lora_A.abs().max() <= layer.in_features**-0.5 and layer.lora_A.std() > 0
        assert not layer.lora_A.grad.any() and not layer.lora_E.grad.any() and layer.lora_B.grad.any(), name
    weight = plain.blocks[0]["up"].weight.requires_grad_()
    loss_of(plain, batches[0]).backward()
    first = dict(adapter_layers(model))["blocks.0.up"]
    torch.testing.assert_close(first.lora_B.grad, 4 * weight.grad @ first.lora_A.detach())


def test_budget_is_exact_at_every_allocation(toy, batches):
    """An off-by-one in the cut would leave a λ too many or too few."""
    _, model, reference, masks = train_pair(toy, batches)
    for step, mask in masks.items():
        assert sum(map(sum, mask.values())) == reference.budgets[step] // 65  # every triplet costs 24 + 40 + 1
    live = sum(int((weights["E"] != 0).sum()) for weights in adapters_of(model).values())
    assert live == 4 * 6


def test_shuffled_scores_give_another_allocation(toy, batches, monkeypatch):
    """If allocation ignored the scores, this mutant would go unnoticed."""
    scores = RankAllocator._scores

    def shuffled(self):
        values = scores(self)
        return values[torch.randperm(len(values), generator=torch.Generator().manual_seed(self.step))]

    monkeypatch.setattr(RankAllocator, "_scores", shuffled)
    _, _, reference, masks = train_pair(toy, batches)
    assert masks != reference.masks


def _observe_absolute(self, pieces, weights, gradients, grad_scale):
    for piece, weight, gradient in zip(pieces, weights, gradients, strict=True):
        piece.statistics["taylor"].mul_(self.config.beta1).add_((weight * gradient).abs(), alpha=1 - self.config.beta1)


@pytest.mark.parametrize(("name", "value"), [("after_update", True), ("observe", _observe_absolute)])
def test_a_wrong_taylor_score_parts_from_the_reference(toy, batches, monkeypatch, name, value):
    """Each mutant is a plausible mistake; the comparison above must be able to see it."""
    monkeypatch.setattr(Taylor, name, value)
    _, _, reference, masks = train_pair(toy, batches, score="taylor", init_weights="adalora")
    assert masks != reference.masks


@pytest.mark.parametrize("mutant", ["no_uncertainty", "no_penalty", "weight_after"])
def test_wrong_methods_part_from_the_reference(toy, batches, monkeypatch, mutant):
    """Each mutant is a plausible mistake; the comparison above must be able to see it."""
    if mutant == "no_uncertainty":
        monkeypatch.setattr(SensitivityUncertainty, "contributions", _sensitivity_alone)
    elif mutant == "no_penalty":
        monkeypatch.setattr(StepReduction, "add_penalty_gradient", lambda *args: None)
    else:
        monkeypatch.setattr(SensitivityUncertainty, "after_update", True)
    score = {"score": "sensitivity_uncertainty", "init_weights": "adalora"}
    _, model, reference, masks = train_pair(toy, batches, **score)
    together, _ = relative_distance(model, reference)
    assert masks != reference.masks or together > 1e-4


def _sensitivity_alone(self, pieces, weights):
    return [piece.statistics["sensitivity"] / piece.rows for piece in pieces]
