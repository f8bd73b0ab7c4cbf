"""A second run on adapters that a first one has pruned."""

import pytest
import torch

from adalora_scale import AdaLoraConfig, RankAllocator, inject_adalora, load_adapter, save_adapter
from adalora_scale.config import SCORES
from tests.toy import Toy

STEPS = 10


@pytest.mark.parametrize("score", SCORES)
def test_what_is_saved_in_its_middle_is_the_model(score, tmp_path):
    """Else the first run's mask cuts triplets that the second has brought back: with `peft` 5 % of the logits."""
    torch.manual_seed(0)
    config = AdaLoraConfig(init_r=4, target_r=2, tinit=2, tfinal=2, deltaT=1, score=score)
    model = inject_adalora(Toy(), config)
    for steps in (STEPS, 6):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        RankAllocator(model, config, total_step=4 * STEPS if steps < STEPS else STEPS).attach(optimizer)
        for _ in range(steps):
            model(torch.randint(0, 32, (4, 8))).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    again = load_adapter(Toy(), tmp_path)
    ids = torch.arange(32).view(4, 8)
    with torch.no_grad():
        torch.testing.assert_close(again(ids), model(ids))
