"""The method on a real GPU: same masks and weights as the float64 reference, low-precision training that prunes."""

import copy

import pytest
import torch
import torch.nn.functional as F

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.checkpoint.flat import Group
from adalora_scale.checkpoint.staging import Staging
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from tests.toy import Toy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

CONFIG = AdaLoraConfig(init_r=6, target_r=4, lora_alpha=12, tinit=5, tfinal=15, deltaT=3, orth_reg_weight=0.3)
STEPS = 60


def run(model, batches, *, device, autocast=None, scaler=False, fused=None):
    model = inject_adalora(model, CONFIG).to(device)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, fused=fused)
    allocator = RankAllocator(model, CONFIG, total_step=STEPS).attach(optimizer)
    grad_scaler = torch.amp.GradScaler(device, enabled=scaler)
    masks = {}
    for ids in batches:
        ids = ids.to(device)
        with torch.autocast(device, autocast, enabled=autocast is not None):
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1).float(), ids[:, 1:].flatten())
        grad_scaler.scale(loss).backward()
        grad_scaler.step(optimizer)
        grad_scaler.update()
        optimizer.zero_grad()
        if allocator.last_allocation and allocator.last_allocation.step == allocator.step:
            masks[allocator.step] = allocator.rank_pattern()
    return allocator, masks, loss.item()


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 32, (8, 12), generator=generator) for _ in range(STEPS)]


@pytest.mark.parametrize("fused", [None, True])
def test_float32_on_cuda_gives_the_masks_of_the_cpu(batches, fused):
    """A kernel that differs (sort, foreach, fused Adam) would part the runs."""
    torch.manual_seed(0)
    model = Toy()
    torch.manual_seed(1)
    _, expected, _ = run(copy.deepcopy(model), batches, device="cpu")
    torch.manual_seed(1)
    torch.backends.cuda.matmul.allow_tf32 = False
    allocator, masks, _ = run(model, batches, device="cuda", fused=fused)
    assert masks == expected
    assert allocator.frozen


@pytest.mark.parametrize(("dtype", "scaler"), [(torch.bfloat16, False), (torch.float16, True)])
def test_low_precision_training_prunes_to_the_budget(batches, dtype, scaler):
    """Scaled gradients or an overflow step must not poison the statistics."""
    torch.manual_seed(0)
    model = Toy()
    torch.manual_seed(1)
    _, _, expected = run(copy.deepcopy(model), batches, device="cuda")
    torch.manual_seed(1)
    allocator, _, loss = run(model, batches, device="cuda", autocast=dtype, scaler=scaler, fused=True)
    allocator.skip_missed_steps(STEPS)
    assert sum(allocator.ranks().values()) == 4 * 6
    assert abs(loss - expected) < 0.02 * expected


def test_staged_copies_are_page_locked_complete_and_used_again():
    """A copy that is still under way when training goes on holds weights of two steps."""
    staging, names = Staging(), {"adapter": ["w"]}
    weight = torch.randn(1 << 24, device="cuda")
    group = Group([("w", 0, weight.numel())], {"weight": [weight]})
    addresses = set()
    for _ in range(2):
        expected = weight.cpu()
        copies = staging.copy({"adapter": group}, names, {"extra": weight[:1]})
        weight.add_(1.0)
        assert copies["adapter.weight"].is_pinned() and copies["adapter.weight"].equal(expected)
        assert copies["extra.extra"].equal(expected[:1])
        addresses.add(copies["adapter.weight"].data_ptr())
    assert len(addresses) == 1
