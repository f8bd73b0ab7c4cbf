"""The package's AdaLoRA step against the plain float64 reference: same masks, same weights."""

import copy

import pytest
import torch
import torch.nn.functional as F

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.adalora.scores.default import SensitivityUncertainty
from adalora_scale.adalora.scores.taylor import Taylor
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.controller.step_sums import StepReduction
from adalora_scale.verify.reference import ReferenceAdaLora, ReferenceOptions
from tests.toy import adapters_of, relative_distance

STEPS = 60


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
        ReferenceOptions(
            init_r=config.init_r, target_r=config.target_r, alpha=config.lora_alpha, tinit=config.tinit,
            tfinal=config.tfinal, total_step=STEPS, delta_t=config.deltaT, preset=config.preset,
            orth_reg_weight=config.orth_reg_weight, lr=5e-3, weight_decay=0.01, max_grad_norm=clip,
        ),
    )  # fmt: skip
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


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preset": "paper"},
        {"preset": "peft"},
        {"preset": "taylor"},
        {"preset": "taylor", "clip": 0.05, "accumulation": 4},
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


def test_budget_is_exact_at_every_allocation(toy, batches):
    """An off-by-one in the cut would leave a λ too many or too few."""
    _, model, reference, masks = train_pair(toy, batches)
    for step, mask in masks.items():
        assert sum(map(sum, mask.values())) == reference.budgets[step]
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
    _, _, reference, masks = train_pair(toy, batches, preset="taylor")
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
    _, model, reference, masks = train_pair(toy, batches)
    together, _ = relative_distance(model, reference)
    assert masks != reference.masks or together > 1e-4


def _sensitivity_alone(self, pieces, weights):
    return [piece.statistics["sensitivity"] / piece.rows for piece in pieces]
