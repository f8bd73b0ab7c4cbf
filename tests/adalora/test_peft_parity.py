"""The same numbers as PEFT's AdaLoRA: its own allocator beside ours, and its own training loop beside ours."""

import peft
import pytest
import torch
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from transformers import AutoModelForCausalLM

from adalora_scale.adalora.allocation import keep_best
from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from tests.toy import Toy

FACTORS = ("lora_A", "lora_E", "lora_B")


def both_configs(names, total_step, **changes):
    values = {"init_r": 6, "target_r": 4, "lora_alpha": 12, "tinit": 4, "tfinal": 10, "deltaT": 3, "beta1": 0.85}
    values = {**values, "beta2": 0.7, "orth_reg_weight": 0.3, **changes}
    ours = AdaLoraConfig(**values, target_modules=names, preset="peft")
    theirs = peft.AdaLoraConfig(**values, target_modules=names, total_step=total_step, lora_dropout=0.0)
    return ours, theirs


def in_our_shape(factor, tensor):
    """PEFT's A is (r, in), E (r, 1); ours (in, r) and (r,)."""
    return {"lora_A": tensor.T, "lora_E": tensor.flatten(), "lora_B": tensor}[factor]


def peft_parameters(model):
    """{(module, factor): parameter} of PEFT's model under our module names."""
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.removeprefix("base_model.model.").removesuffix(".default").split(".")
        if parts[-1] in FACTORS:
            found[".".join(parts[:-1]), parts[-1]] = parameter
    return found


def masks_of(pattern):
    return {key.removeprefix("base_model.model.").removesuffix(".default").removesuffix(".lora_E"): value
            for key, value in pattern.items()}  # fmt: skip


# ---- (a) the same w and g through both allocators


@pytest.mark.parametrize("target_r", [1, 3, 5])
def test_same_weights_and_gradients_give_the_same_statistics_and_masks(target_r):
    """Any difference in the EMAs, the score or the cut would make 'AdaLoRA' mean something else than in PEFT."""
    steps = 40
    names = ["up", "down"]
    ours_config, theirs_config = both_configs(
        names, steps, target_r=target_r, orth_reg_weight=0.0, tinit=0, tfinal=0, deltaT=1000
    )
    ours_config = ours_config.replace(score="sensitivity_uncertainty")  # the hook sees the w and g of the moment
    torch.manual_seed(0)
    theirs = peft.get_peft_model(Toy(), theirs_config)
    peft_allocator = PeftAllocator(theirs.base_model.model, theirs_config, "default")
    model = inject_adalora(Toy(), ours_config)
    layers = dict(adapter_layers(model))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0)
    allocator = RankAllocator(model, ours_config, total_step=steps).attach(optimizer)
    theirs_by_name = peft_parameters(theirs)
    assert {name for name, _ in theirs_by_name} == set(layers)
    generator = torch.Generator().manual_seed(3)

    def feed():
        with torch.no_grad():
            for (name, factor), theirs_p in theirs_by_name.items():
                # sizes that differ between triplets and modules, so that scores spread over orders of magnitude
                w, g = (torch.randn(theirs_p.shape, generator=generator) for _ in range(2))
                g = g * torch.rand((), generator=generator).exp() * 10 ** -(2 * torch.rand((), generator=generator))
                theirs_p.copy_(w)
                theirs_p.grad = g
                ours_p = getattr(layers[name], factor)
                ours_p.copy_(in_our_shape(factor, w))
                ours_p.grad = in_our_shape(factor, g).clone()
        peft_allocator.update_ipt(theirs.base_model.model)

    for _ in range(steps - 1):
        feed()
        optimizer.step()
    for span, ours_i, ours_u in zip(
        allocator.sharding.spans, *(allocator.statistics[n] for n in ("sensitivity", "uncertainty")), strict=True
    ):
        key = f"{span.tensor.module}.{span.tensor.factor}.default"
        for ours, table in ((ours_i, peft_allocator.exp_avg_ipt), (ours_u, peft_allocator.exp_avg_unc)):
            torch.testing.assert_close(
                ours, in_our_shape(span.tensor.factor, table[key]).reshape(-1), rtol=1e-6, atol=0
            )

    scores = allocator._scores().view(len(layers), -1)
    for row, name in zip(scores, layers, strict=True):
        element = {f: peft_allocator._element_score(f"{name}.{f}.default") for f in FACTORS}
        a = element["lora_A"].mean(dim=1, keepdim=True)
        b = element["lora_B"].mean(dim=0).view(-1, 1)
        expected = peft_allocator._combine_ipt(element["lora_E"], torch.cat([a, b], dim=1))
        torch.testing.assert_close(row, expected, rtol=1e-6, atol=0)
    for budget in (1, 7, 18, 29, 35):
        pattern = masks_of(peft_allocator.mask_to_budget(theirs.base_model.model, budget))
        mask = keep_best(scores.flatten(), budget).view(len(layers), -1).tolist()
        assert dict(zip(layers, mask, strict=True)) == pattern

    feed()
    optimizer.step()  # the hook allocates, at target_r triplets a matrix
    pattern = masks_of(peft_allocator.mask_to_budget(theirs.base_model.model, target_r * len(layers)))
    assert masks_of(allocator.rank_pattern()) == pattern
    for name, layer in layers.items():
        assert torch.equal(layer.lora_E.detach() != 0, torch.tensor(pattern[name]))
        assert torch.equal(layer.lora_E.detach(), theirs_by_name[name, "lora_E"].detach().flatten())


# ---- (b) the same training, PEFT's loop and ours


def test_preset_peft_trains_to_the_weights_of_pefts_own_loop(stories260k):
    """The preset promises PEFT's trajectory: same masks at every allocation and the same weights at the end."""
    steps = 44
    names = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
    ours_config, theirs_config = both_configs(names, steps, tfinal=9)
    theirs_config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    theirs = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(stories260k), theirs_config)
    model = inject_adalora(AutoModelForCausalLM.from_pretrained(stories260k), ours_config)
    layers = dict(adapter_layers(model))
    theirs_by_name = peft_parameters(theirs)
    assert len(layers) == 25
    with torch.no_grad():
        for (name, factor), p in theirs_by_name.items():
            getattr(layers[name], factor).copy_(in_our_shape(factor, p))
    start = {key: in_our_shape(key[1], p.detach().clone()) for key, p in theirs_by_name.items()}

    def optimizer_of(m):
        return torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=3e-3, weight_decay=0.01)

    their_optimizer, our_optimizer = optimizer_of(theirs), optimizer_of(model)
    allocator = RankAllocator(model, ours_config, total_step=steps).attach(our_optimizer)
    generator = torch.Generator().manual_seed(1)
    allocations = []
    for step in range(1, steps + 1):
        ids = torch.randint(3, 512, (4, 16), generator=generator)
        theirs(input_ids=ids, labels=ids).loss.backward()
        their_optimizer.step()
        if step <= 35:
            theirs.peft_config["default"].rank_pattern = None  # what is there afterwards is of this step
        theirs.base_model.update_and_allocate(step)
        their_optimizer.zero_grad()

        model(input_ids=ids, labels=ids).loss.backward()
        our_optimizer.step()
        our_optimizer.zero_grad()

        pattern = theirs.peft_config["default"].rank_pattern
        allocated = allocator.last_allocation is not None and allocator.last_allocation.step == step
        assert allocated == (pattern is not None and step <= 35)
        if allocated:
            allocations.append(step)
            assert masks_of(allocator.rank_pattern()) == masks_of(pattern), step
    assert allocations == [6, 9, 12, 15, 18, 21, 24, 27, 30, 33, 35]
    assert sum(allocator.ranks().values()) == 4 * 25
    assert len(set(allocator.ranks().values())) > 2

    difference = total = moved = 0.0
    for (name, factor), p in theirs_by_name.items():
        expected = in_our_shape(factor, p.detach())
        difference += (getattr(layers[name], factor).detach() - expected).square().sum().item()
        total += expected.square().sum().item()
        moved += (expected - start[name, factor]).square().sum().item()
    assert (difference / total) ** 0.5 < 1e-5
    assert (moved / total) ** 0.5 > 0.1  # the training went somewhere


def test_pefts_score_differs_where_it_says_it_does():
    """Were the score ignored, the test above would compare PEFT with whatever the default is."""
    runs = []
    for score in ("peft", "sensitivity_uncertainty"):
        ours_config, _ = both_configs(["up", "down"], 30)
        torch.manual_seed(0)
        model = inject_adalora(Toy(), ours_config.replace(score=score))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        allocator = RankAllocator(model, ours_config.replace(score=score), total_step=30).attach(optimizer)
        for step in range(8):
            ids = torch.randint(0, 32, (4, 8), generator=torch.Generator().manual_seed(step))
            model(ids).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs.append(torch.cat(allocator.statistics["sensitivity"]))
    assert (runs[0] - runs[1]).norm() > 1e-2 * runs[1].norm()
