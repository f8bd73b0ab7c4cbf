"""Dtypes and shapes around the adapters: another default dtype, single trained numbers, weights without masters."""

import contextlib

import pytest
import torch
from torch import nn

from adalora_scale.adalora.injection import inject_adalora
from adalora_scale.checkpoint.finding import find_checkpoint
from adalora_scale.checkpoint.state import allocator_position, gather, scatter
from adalora_scale.checkpoint.writing import write_checkpoint
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.errors import UserError
from tests.toy import Toy

STEPS = 10
CONFIG = AdaLoraConfig(
    target_modules=["up", "down"], init_r=6, target_r=3, tinit=1, tfinal=2, deltaT=2, orth_reg_weight=0.3
)


class Tempered(Toy):
    """A toy whose logits are divided by a trained number."""

    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, ids):
        return super().forward(ids) / self.temperature


def prepared(kind=Toy):
    torch.manual_seed(0)
    model = inject_adalora(kind(), CONFIG)
    if kind is Tempered:
        model.temperature.requires_grad_(True)
        model.head.requires_grad_(True)  # written in the same group as the number
    return model


def attached(model):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    return optimizer, RankAllocator(model, CONFIG, total_step=STEPS).attach(optimizer)


def run(model, optimizer, batches):
    for ids in batches:
        loss = nn.functional.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("since", ["injection", "attach", "training"])
def test_another_default_dtype_changes_nothing(dtype, since, batches):
    """Else sums over layers are rounded to 8 bits, and other triplets are kept, without a word."""
    model = prepared()
    optimizer, allocator = attached(model)
    run(model, optimizer, batches[:STEPS])
    torch.manual_seed(0)
    base = Toy()
    with default_dtype(dtype) if since == "injection" else contextlib.nullcontext():
        other = inject_adalora(base, CONFIG)
    with default_dtype(dtype) if since != "training" else contextlib.nullcontext():
        second, another = attached(other)
    with default_dtype(dtype):
        run(other, second, batches[:STEPS])
        figures = another.metrics()
    assert torch.equal(another.mask, allocator.mask) and figures == allocator.metrics()
    expected, found = trained(model), trained(other)
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("optim", [torch.optim.AdamW, torch.optim.NAdam, torch.optim.RMSprop])
def test_a_single_trained_number_is_written_and_resumed(optim, batches, tmp_path):
    """Else its step count is taken for a moment, and every other parameter gets a step count for each weight."""

    def start():
        model = prepared(Tempered)
        optimizer = optim([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        return model, optimizer, RankAllocator(model, CONFIG, total_step=STEPS).attach(optimizer)

    model, optimizer, allocator = start()
    run(model, optimizer, batches[:5])
    gathered = gather(model, allocator.sharding, allocator)
    write_checkpoint(tmp_path, 5, gathered, {}, {"allocator": allocator_position(allocator)}, {})
    run(model, optimizer, batches[5:STEPS])
    again, second, another = start()
    scatter(find_checkpoint(str(tmp_path / "checkpoint-5"), tmp_path), again, another.sharding, another)
    shapes = {key: {k: v.shape for k, v in state.items() if torch.is_tensor(v)} for key, state in
              zip(trained(again), second.state.values(), strict=True)}  # fmt: skip
    assert all("step" not in found or found["step"] == () for found in shapes.values())
    run(again, second, batches[5:STEPS])
    expected, found = trained(model), trained(again)
    assert found["temperature"] != 1 and all(torch.equal(found[name], expected[name]) for name in expected)
    assert torch.equal(another.mask, allocator.mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_trained_weight_that_is_not_float32_is_refused_by_name(dtype):
    """Else it stays where it is at a small learning rate, and the first checkpoint ends the run."""
    model = prepared()
    model.head.to(dtype).requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with pytest.raises(UserError, match=rf"'head.weight' is trained as {dtype}.*adalora.modules_to_save"):
        RankAllocator(model, CONFIG, total_step=STEPS).attach(optimizer)


def test_a_frozen_16_bit_weight_in_the_optimizer_is_none_of_it():
    """Else loops that hand over model.parameters() are refused for weights that nobody trains."""
    model = prepared()
    model.head.to(torch.bfloat16)
    RankAllocator(model, CONFIG, total_step=STEPS).attach(torch.optim.AdamW(model.parameters()))
