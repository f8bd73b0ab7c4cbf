"""What the default remembers between steps, in bytes of live tensors."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator


def remembered_and_adapter(folder, **options):
    """Bytes of the score's statistics and of the adapter after two steps of the small pretrained model."""
    model = inject_adalora(AutoModelForCausalLM.from_pretrained(folder), config := AdaLoraConfig(**options))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    allocator = RankAllocator(model, config, total_step=40).attach(optimizer)
    ids = torch.arange(3, 35).view(2, 16)
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tensors = [tensor for kind in allocator.statistics.values() for tensor in kind]
    assert any(tensor.any() for tensor in tensors)
    return sum(tensor.nbytes for tensor in tensors), sum(parameter.nbytes for parameter in trained)


def test_the_default_remembers_a_hundredth_of_the_adapter(stories260k):
    """Else QAdaLoRA on 70 B pays gigabytes for scores; this model's matrices are far narrower."""
    remembered, adapter = remembered_and_adapter(stories260k)
    assert 0 < remembered <= 0.01 * adapter


@pytest.mark.parametrize("score", ["sensitivity_uncertainty", "paper"])
def test_the_published_score_remembers_two_numbers_a_weight(stories260k, score):
    """What the figure above is beside; else it could be zero for every score."""
    remembered, adapter = remembered_and_adapter(stories260k, score=score)
    assert remembered == 2 * adapter
