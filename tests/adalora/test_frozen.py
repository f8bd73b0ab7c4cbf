"""A frozen base stays what it was: weights, and the running statistics of normalisations."""

import copy

import pytest
import torch
from torch import nn

from adalora_scale.adalora.frozen import freeze
from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.export.peft_adalora import load_adapter, save_adapter


class Pictures(nn.Module):
    """Convolutions with one normalisation that stays the base's and one trained in full."""

    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3), norm(4, track_running_stats=True)
        self.last, self.own = nn.Conv2d(4, 3, 2), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.own(self.last(torch.relu(self.norm(self.conv(x))))).mean((2, 3))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
def test_a_saved_adapter_computes_what_the_trained_model_computes(norm, tmp_path):
    """Else running statistics of the training data are in the live model alone, and the loaded one is another."""
    torch.manual_seed(0)
    base = Pictures(norm)
    fresh = copy.deepcopy(base)
    config = AdaLoraConfig(init_r=3, target_r=2, target_modules=["conv", "last"], modules_to_save=["own"])
    model = inject_adalora(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    pictures = torch.randn(8, 1, 6, 6) * 3 + 2
    before = model.own.running_mean.clone()
    for step in range(5):
        optimizer.zero_grad()
        model(pictures + step).square().sum().backward()
        optimizer.step()
    model.eval()
    assert not torch.equal(model.own.running_mean, before)
    save_adapter(model, tmp_path)
    loaded = load_adapter(copy.deepcopy(fresh), tmp_path).eval()
    torch.testing.assert_close(loaded(pictures), model(pictures))
    assert torch.equal(model.norm.running_var, fresh.norm.running_var)


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.InstanceNorm1d])
def test_frozen_statistics_change_no_forward(norm):
    """Else freezing them makes another model, in training or in evaluation."""
    torch.manual_seed(0)
    own = norm(4, affine=True, track_running_stats=True)
    own.running_mean.normal_()
    frozen = copy.deepcopy(own)
    freeze(frozen, [])
    values = torch.randn(6, 4, 5) * 3 + 1
    assert torch.equal(frozen(values), own(values))
    assert not torch.equal(frozen.running_mean, own.running_mean)
    own.load_state_dict(frozen.state_dict())
    assert torch.equal(frozen.eval()(values), own.eval()(values))
