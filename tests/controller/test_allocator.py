"""The two hooks inside real optimizer steps: what moves, what must not, and that a run can be continued."""

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from adalora_scale.adalora.injection import adapter_layers, inject_adalora
from adalora_scale.config import AdaLoraConfig
from adalora_scale.controller import RankAllocator
from adalora_scale.errors import Unsupported, UserError
from tests.toy import Toy, adapters_of

TOTAL, FINAL = 24, 18
ALLOCATIONS = [6, 9, 12, 15, 18]


def options(**changes):
    values = {"init_r": 4, "target_r": 2, "lora_alpha": 8, "tinit": 3, "tfinal": 6, "deltaT": 3, "orth_reg_weight": 0.3}
    values |= {"budget_unit": "triplets", "init_weights": "adalora", "score": "sensitivity_uncertainty"}
    return AdaLoraConfig(**{**values, **changes})


def adamw(parameters, **changes):
    return torch.optim.AdamW(parameters, **{"lr": 5e-3, "weight_decay": 0.01, **changes})


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.2, momentum=0.9)


class Run:
    """A toy model in training; `head` trains the output head in a parameter group of its own."""

    def __init__(
        self, config=None, optimizer=adamw, *, total_step=TOTAL, head=False, seed=0, scaler=None, autocast=None
    ):
        torch.manual_seed(seed)
        config = config or options(**({"modules_to_save": ["head"]} if head else {}))
        self.model = inject_adalora(Toy(), config)
        adapters = [p for name, p in self.model.named_parameters() if "lora_" in name]
        groups = [{"params": adapters}]
        if head:
            groups.append({"params": list(self.model.head.parameters()), "lr": 1e-2})
        self.optimizer = optimizer(groups)
        self.allocator = RankAllocator(self.model, config, total_step=total_step).attach(self.optimizer)
        self.scaler, self.autocast = scaler, autocast
        self.masks = {}
        generator = torch.Generator().manual_seed(1)
        self.batches = [torch.randint(0, 32, (8, 12), generator=generator) for _ in range(total_step)]
        self.calls = 0

    def loss(self, ids):
        with torch.autocast("cpu", dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            logits = self.model(ids[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    def backward(self, accumulation=1):
        ids = self.batches[self.calls]
        for part in ids.chunk(accumulation):
            loss = self.loss(part) / accumulation
            (self.scaler.scale(loss) if self.scaler else loss).backward()

    def step(self, *, accumulation=1, clip=None, poison=None):
        self.backward(accumulation)
        if poison is not None:
            poison(self.model)
        if clip:
            if self.scaler:
                self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], clip)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.calls += 1
        last = self.allocator.last_allocation
        if last is not None and last.step == self.allocator.step:
            self.masks[last.step] = self.allocator.mask.tolist()
        return self

    def train(self, until=TOTAL, **how):
        while self.calls < until:
            self.step(**how)
        return self

    def trainable(self):
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def everything(self):
        """Copies of all that a cancelled step must leave alone."""
        return copy.deepcopy(
            {
                "weights": self.trainable(),
                "moments": self.optimizer.state_dict()["state"],
                "statistics": self.allocator.statistics,
                "mask": self.allocator.mask,
            }
        )

    def snapshot(self):
        return copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), self.allocator.state_dict()))

    def restore(self, snapshot, *, allocator_first=False):
        model, optimizer, allocator = copy.deepcopy(snapshot)
        self.model.load_state_dict(model)
        if allocator_first:
            self.allocator.load_state_dict(allocator)
        self.optimizer.load_state_dict(optimizer)
        if not allocator_first:
            self.allocator.load_state_dict(allocator)
        self.calls = allocator["step"]
        return self


def leaves(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, dict):
        return [leaf for key in tree for leaf in leaves(tree[key])]
    return [leaf for item in tree for leaf in leaves(item)] if isinstance(tree, list | tuple) else []


def assert_same(a, b):
    first, second = leaves(a), leaves(b)
    assert len(first) == len(second) > 0
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def distance(a, b):
    """‖a − b‖ / ‖b‖ over all trainable weights together."""
    a, b = (torch.cat([p.flatten().double() for p in run.trainable().values()]) for run in (a, b))
    return ((a - b).norm() / b.norm()).item()


def kept_and_pruned(run):
    """(name, weight or moment, keep along the last dimension) of every adapter tensor and its moments."""
    pattern = run.allocator.rank_pattern()
    for name, layer in adapter_layers(run.model):
        keep = torch.tensor(pattern[f"{name}.lora_E"])
        for factor in ("lora_A", "lora_E", "lora_B"):
            parameter = getattr(layer, factor)
            yield f"{name}.{factor}", parameter.detach(), keep
            for key, value in run.optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    yield f"{name}.{factor}.{key}", value, keep


# ---- what an allocation does


def test_allocations_happen_when_the_schedule_says_and_keep_exactly_the_budget():
    """A missed or extra allocation, or a λ too many, would not show in the loss."""
    run = Run()
    for _ in range(TOTAL):
        before = run.allocator.mask.clone()
        run.step()
        t = run.allocator.step
        if t not in ALLOCATIONS:
            assert torch.equal(run.allocator.mask, before)
        budget = run.allocator.schedule.budget(t) if t in ALLOCATIONS else run.allocator.budget
        assert sum(run.allocator.ranks().values()) == int(run.allocator.mask.sum()) == budget
        if t in ALLOCATIONS:
            live = torch.cat([layer.lora_E.detach() for _, layer in adapter_layers(run.model)]) != 0
            assert torch.equal(live, run.allocator.mask)  # pruned λ are exactly zero, kept ones are not
    assert list(run.masks) == ALLOCATIONS
    assert int(run.allocator.mask.sum()) == 12
    assert run.allocator.frozen


def test_pruned_triplets_may_come_back():
    """λ must stay trainable until the freeze, else one bad allocation is final."""
    run = Run(options(beta1=0.3, beta2=0.3)).train()
    masks = list(run.masks.values())
    assert any(new and not old for a, b in itertools.pairwise(masks) for old, new in zip(a, b, strict=True))


OPTIMIZERS = {
    "adamw": adamw,
    "adamw_decay": lambda p: adamw(p, weight_decay=0.5),
    "adamw_amsgrad": lambda p: adamw(p, amsgrad=True),
    "adamw_fused": lambda p: adamw(p, fused=True),
    "adamw_foreach": lambda p: adamw(p, foreach=True),
    "sgd_plain": lambda p: torch.optim.SGD(p, lr=0.2),
    "sgd_momentum": sgd,
    "sgd_nesterov_decay": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.02),
    "nadam": lambda p: torch.optim.NAdam(p, lr=5e-3),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=2e-3, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_pruned_triplets_are_zero_from_the_freeze_to_the_end(name):
    """Removing pruned triplets physically must change nothing, under every optimizer and with weight decay."""
    run = Run(optimizer=OPTIMIZERS[name]).train(FINAL)
    assert run.allocator.frozen
    frozen = run.allocator.mask.clone()
    at_freeze = copy.deepcopy(run.trainable())
    while True:
        for tensor_name, value, keep in kept_and_pruned(run):
            assert torch.isfinite(value).all(), tensor_name
            pruned = value[..., ~keep]
            assert torch.equal(pruned, torch.zeros_like(pruned)), (tensor_name, run.calls)
        if run.calls == TOTAL:
            break
        run.step()
    assert torch.equal(run.allocator.mask, frozen)
    assert all(not torch.equal(p, at_freeze[n]) for n, p in run.trainable().items() if p.any())  # the kept ones learn
    assert list(run.masks) == ALLOCATIONS


def test_eight_bit_optimizer_state_is_not_taken_for_numbers():
    """Zeroing the codes of a quantised moment makes it the most negative value, and pruned columns move again."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    run = Run(optimizer=lambda p: bitsandbytes.optim.AdamW8bit(p, lr=5e-3, min_8bit_size=64))
    run.train(FINAL - 1)
    codes = [s["state1"] for s in run.optimizer.state.values() if s["state1"].dtype == torch.uint8]
    assert len(codes) == 12
    untouched = [c.clone() for c in codes]
    run.allocator._freeze()
    assert run.allocator.mask.sum() < 24
    assert all(torch.equal(a, b) for a, b in zip(codes, untouched, strict=True))
    run.train()
    for name, value, keep in kept_and_pruned(run):
        if name.endswith(".lora_E"):
            assert torch.equal(value[~keep], torch.zeros(int((~keep).sum())))


class Products(TorchDispatchMode):
    """Counts matrix products."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


def products_of_a_step(run):
    with Products() as products:
        run.step()
    return products.count


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_modules_without_a_triplet_compute_nothing_from_the_freeze_on(name):
    """They must end where computing with their zero columns does, to the bit, with a gradient of every parameter."""
    run, whole = (Run(options(target_r=1), OPTIMIZERS[name]).train(FINAL) for _ in range(2))
    emptied = [n for n, layer in adapter_layers(run.model) if layer.emptied]
    assert emptied == [n for n, r in run.allocator.ranks().items() if r == 0] != []
    for _, layer in adapter_layers(whole.model):
        layer.emptied = False
    saved = products_of_a_step(whole) - products_of_a_step(run)
    # Each: two products forward, four backward, less one where the embedding below needs no gradient.
    assert saved >= 5 * len(emptied)
    run.backward(), whole.backward()
    gradients = [{n: p.grad for n, p in r.model.named_parameters() if p.requires_grad} for r in (run, whole)]
    assert_same(*gradients)
    run.train(), whole.train()
    assert_same(run.everything(), whole.everything())


def test_columns_that_a_score_keeps_are_computed_with():
    """PEFT's score keeps pruned columns, whose λ has a gradient that counts in the norm."""
    run = Run(options(target_r=1, score="peft"), seed=2).train(FINAL)
    assert 0 in run.allocator.ranks().values()
    assert not any(layer.emptied for _, layer in adapter_layers(run.model))


# ---- loops


def test_accumulation_equals_one_big_batch():
    """Importance must see the accumulated gradient once, not every micro-batch."""
    whole, parts = Run().train(), Run().train(accumulation=4)
    assert parts.masks == whole.masks
    assert distance(parts, whole) < 1e-5  # the contract's bound for another summation order
    assert parts.allocator.step == TOTAL


def test_bf16_autocast_runs_to_the_freeze():
    """Importance of bf16 gradients underflowed in PEFT; here weights, Ī and Ū are float32."""
    run = Run(autocast=torch.bfloat16).train()
    assert all(torch.isfinite(p).all() for p in run.trainable().values())
    assert list(run.masks) == ALLOCATIONS
    assert int(run.allocator.mask.sum()) == 12
    assert run.allocator.skipped_steps == 0


SCALED = [adamw, lambda p: adamw(p, fused=True)]


@pytest.mark.parametrize("optimizer", SCALED, ids=["adamw", "fused"])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["no clip", "unscale and clip"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_grad_scaler_changes_nothing(optimizer, clip, autocast):
    """Importance or penalty taken at the wrong scale would change masks; the fused optimizer unscales inside step()."""
    plain = Run(optimizer=optimizer, autocast=autocast).train(8, clip=clip)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    scaled = Run(optimizer=optimizer, autocast=autocast, scaler=scaler).train(8, clip=clip)
    assert scaler.get_scale() == 2.0**14  # importance that followed the scale would favour the latest steps
    for kind in ("sensitivity", "uncertainty"):
        ours, expected = (torch.cat(run.allocator.statistics[kind]) for run in (scaled, plain))
        assert (ours - expected).norm() < 1e-6 * expected.norm()
    plain.train(clip=clip)
    scaled.train(clip=clip)
    assert scaled.masks == plain.masks
    assert list(scaled.masks) == ALLOCATIONS
    # A power of two scales float32 and bf16 exactly; only what underflows at one scale and not at the other can differ.
    assert distance(scaled, plain) < 1e-7
    assert torch.equal(scaled.allocator._penalty, plain.allocator._penalty)
    torch.testing.assert_close(scaled.allocator._task_norm, plain.allocator._task_norm, rtol=1e-6, atol=0)


@pytest.mark.parametrize("optimizer", SCALED, ids=["adamw", "fused"])
@pytest.mark.parametrize("clip", [None, 0.05], ids=["no clip", "unscale and clip"])
def test_fp16_autocast_with_scaler_learns_what_fp32_learns(optimizer, clip):
    """The usual fp16 loop must reach the freeze with weights near those of float32."""
    exact = Run(optimizer=optimizer).train(clip=clip)
    half = Run(
        optimizer=optimizer, autocast=torch.float16, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12)
    ).train(clip=clip)
    assert list(half.masks) == ALLOCATIONS
    start = Run(optimizer=optimizer)
    assert distance(half, exact) < 0.2 * distance(start, exact)
    agreement = sum(a == b for a, b in zip(half.masks[FINAL], exact.masks[FINAL], strict=True))
    assert agreement >= 20  # of 24


def infinite(name):
    def poison(model):
        model.get_parameter(name).grad.view(-1)[3] = torch.inf

    return poison


def not_a_number(name):
    def poison(model):
        model.get_parameter(name).grad.view(-1)[0] = torch.nan

    return poison


POISONS = {
    "inf in A": infinite("blocks.1.up.lora_A"),
    "nan in E": not_a_number("blocks.0.down.lora_E"),
    "nan in head": not_a_number("head.bias"),
    "-inf in head": lambda model: model.head.weight.grad.fill_(-torch.inf),
}


@pytest.mark.shows("features", feature="a step that is not finite changes nothing, on any rank", engine="one process")
@pytest.mark.parametrize("optimizer", [adamw, SCALED[1], sgd], ids=["adamw", "fused", "sgd momentum"])
@pytest.mark.parametrize("poison", POISONS.values(), ids=POISONS)
def test_overflow_step_changes_nothing_and_its_allocation_is_made_up(optimizer, poison):
    """One NaN in Ī ends all pruning (PEFT); with gradients zeroed, momentum would still move the weights."""
    run = Run(optimizer=optimizer, head=True).train(8)  # moments are not zero by now
    before = run.everything()
    assert any(m.abs().sum() > 0 for m in leaves(before["moments"]))
    assert run.step(poison=poison).allocator.step == 9  # an allocation was due at 9
    assert_same(run.everything(), before)
    assert run.allocator.skipped_steps == run.allocator.metrics()["adalora/skipped_steps"] == 1
    assert run.allocator.last_allocation.step == 6
    run.step()
    assert run.allocator.last_allocation.step == 10
    assert run.allocator.budget == run.allocator.schedule.budget(10) == int(run.allocator.mask.sum())
    after = run.everything()
    assert all(not torch.equal(after["weights"][n], w) for n, w in before["weights"].items())
    run.train()
    assert list(run.masks) == [6, 10, 12, 15, 18]
    assert run.allocator.frozen
    assert all(torch.isfinite(p).all() for p in run.trainable().values())


def test_overflow_at_the_final_allocation_freezes_at_the_next_step():
    """The run would otherwise end with every λ live."""
    run = Run().train(17).step(poison=POISONS["inf in A"])
    assert not run.allocator.frozen
    run.step()
    assert run.allocator.frozen
    assert run.allocator.last_allocation.step == 19
    assert int(run.allocator.mask.sum()) == 12
    run.train()
    assert list(run.masks) == [6, 9, 12, 15, 19]


@pytest.mark.parametrize("score", ["sensitivity_uncertainty", "peft"])
@pytest.mark.parametrize("bad", [1, 7], ids=["the last step", "every step from the final allocation on"])
def test_overflow_to_the_end_prunes_with_the_statistics_so_far(bad, score):
    """Else a run whose last step is not finite ends with every λ live, and saves an adapter above its budget."""
    config = options(tfinal=bad - 1, score=score)
    run = Run(config).train(TOTAL - bad)
    before = run.everything()
    scores = run.allocator._scores()
    for _ in range(bad - 1):
        run.step(poison=POISONS["inf in A"])
        assert_same(run.everything(), before)
    run.step(poison=POISONS["inf in A"])
    assert run.allocator.frozen
    assert run.allocator.last_allocation.step == TOTAL
    assert run.allocator.skipped_steps == bad
    expected = torch.zeros(24, dtype=torch.bool)
    expected[scores.argsort(descending=True, stable=True)[:12]] = True
    assert torch.equal(run.allocator.mask, expected)
    for name, row in run.allocator.rank_pattern().items():
        keep = torch.tensor(row)
        module = name.removesuffix(".lora_E")
        for factor in "AEB":
            kept = keep | (score == "peft" and factor != "E")  # no weight moves but those that pruning removes
            key = f"{module}.lora_{factor}"
            assert torch.equal(run.trainable()[key], before["weights"][key] * kept)


def test_last_step_that_a_scaler_drops_prunes_too():
    """The optimizer is not even called: nothing but the loop's own count says that the run is over."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    run = Run(options(tfinal=0), head=False, scaler=scaler).train(TOTAL - 1)
    run.step(poison=POISONS["inf in A"])
    assert not run.allocator.frozen
    run.allocator.skip_missed_steps(completed=TOTAL)
    assert run.allocator.frozen
    assert int((torch.cat([p for n, p in run.trainable().items() if n.endswith("lora_E")]) != 0).sum()) == 12


def test_overflow_after_the_freeze_changes_nothing():
    """After the freeze there is no Ī left to protect, but weights and moments are."""
    run = Run(optimizer=sgd).train(20)
    before = run.everything()
    run.step(poison=POISONS["nan in E"])
    assert_same(run.everything(), before)
    assert run.allocator.skipped_steps == 1


@pytest.mark.parametrize("optimizer", [*SCALED, sgd], ids=["adamw", "fused", "sgd"])
def test_overflow_under_a_grad_scaler(optimizer):
    """The plain optimizer is not even called, the fused one is called with found_inf: both must count and catch up."""
    run = Run(optimizer=optimizer, head=True, scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12)).train(8)
    before = run.everything()
    run.step(poison=POISONS["inf in A"])
    run.allocator.skip_missed_steps(completed=9)
    assert (run.allocator.step, run.allocator.skipped_steps) == (9, 1)
    assert run.scaler.get_scale() == 2.0**11
    run.allocator.skip_missed_steps(completed=9)  # once more changes nothing
    assert (run.allocator.step, run.allocator.skipped_steps) == (9, 1)
    assert_same(run.everything(), before)
    run.step()
    run.allocator.skip_missed_steps(completed=10)
    assert (run.allocator.step, run.allocator.skipped_steps) == (10, 1)
    assert run.allocator.last_allocation.step == 10
    assert run.train().allocator.frozen


def test_found_inf_of_a_fused_optimizer_counts_even_when_the_gradients_look_finite():
    """A loop that repairs NaN after unscale_ leaves finite gradients of a step that the fused optimizer skips."""
    run = Run(optimizer=SCALED[1], scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12)).train(8)
    before = run.everything()
    run.backward()
    POISONS["inf in A"](run.model)
    run.scaler.unscale_(run.optimizer)
    for parameter in run.trainable():
        torch.nan_to_num_(run.model.get_parameter(parameter).grad, posinf=0.0)
    run.scaler.step(run.optimizer)
    assert_same(run.everything(), before)
    assert (run.allocator.step, run.allocator.skipped_steps) == (9, 1)


def test_step_that_ends_in_an_exception_does_not_end_the_pruning():
    """A loop that catches an out-of-memory error in step() and goes on must still be pruned at the end."""
    run = Run().train(4)

    def fail(*_):
        raise MemoryError

    handle = run.optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        run.step()
    handle.remove()
    run.optimizer.zero_grad()
    run.calls = 5
    assert list(run.train().masks) == ALLOCATIONS
    assert run.allocator.frozen


def test_large_gradients_of_a_half_precision_head_are_finite():
    """A norm taken in fp16 overflows at 65,504, far below what its elements allow, and every step would be skipped."""
    run = Run(head=True)
    run.model.head.half()
    for name, parameter in run.trainable().items():
        value = 3000.0 if "head" in name else 1e-3
        run.model.get_parameter(name).grad = torch.full_like(parameter, value)
    run.optimizer.step()
    assert run.allocator.skipped_steps == 0
    run.model.head.weight.grad[0, 0] = torch.inf
    run.optimizer.step()
    assert run.allocator.skipped_steps == 1


def test_missed_steps_over_an_allocation_and_the_freeze():
    """A scaler that drops several steps around the freeze must not leave the run unpruned."""
    run = Run().train(14)
    run.allocator.skip_missed_steps(completed=19)
    assert (run.allocator.step, run.allocator.skipped_steps) == (19, 5)
    assert not run.allocator.frozen
    run.calls = 19
    run.step()
    assert run.allocator.frozen
    assert run.allocator.last_allocation.step == 20
    assert int(run.allocator.mask.sum()) == 12


def test_parameter_groups_keep_their_own_rates():
    """LoRA+ gives B another learning rate; hooks must see every group and only scale none of them."""

    def grouped(groups):
        parameters = groups[0]["params"]
        factors = [[p for i, p in enumerate(parameters) if i % 3 == k] for k in range(3)]
        return torch.optim.SGD([{"params": f, "lr": lr} for f, lr in zip(factors, (0.1, 0.2, 0.4), strict=True)])

    run = Run(options(orth_reg_weight=0.0), optimizer=grouped)
    run.backward()
    before = copy.deepcopy(run.trainable())
    gradients = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    run.optimizer.step()
    for name, p in run.trainable().items():
        rate = {"A": 0.1, "E": 0.2, "B": 0.4}[name[-1]]
        torch.testing.assert_close(p, before[name] - rate * gradients[name], rtol=0, atol=1e-7)
    run.optimizer.zero_grad()
    run.calls = 1
    assert list(run.train().masks) == ALLOCATIONS


def test_parameter_without_gradient_counts_as_zero():
    """A layer that a batch does not use (PEFT: TypeError) has sensitivity that fades, and no crash."""
    run = Run().train(4)
    index = [f"{s.tensor.module}.{s.tensor.factor}" for s in run.allocator.sharding.spans].index("blocks.1.up.lora_A")
    old = run.allocator.statistics["sensitivity"][index].clone()

    def drop(model):
        for factor in "AEB":
            model.get_parameter(f"blocks.1.up.lora_{factor}").grad = None

    run.step(poison=drop)
    torch.testing.assert_close(run.allocator.statistics["sensitivity"][index], 0.85 * old)
    while run.calls < TOTAL:
        run.step(poison=drop)
    assert run.allocator.frozen
    assert run.allocator.ranks()["blocks.1.up"] < 2  # what gets no gradient loses its triplets


def test_without_penalty_the_gradient_is_left_alone():
    """orth_reg_weight=0 must be the plain method, bit for bit, and log zero."""
    run = Run(options(orth_reg_weight=0.0), optimizer=lambda p: torch.optim.SGD(p, lr=0.2))
    run.backward()
    gradients = {name: p.grad.clone() for name, p in run.model.named_parameters() if p.grad is not None}
    run.optimizer.step()
    assert all(torch.equal(run.model.get_parameter(name).grad, g) for name, g in gradients.items())
    metrics = run.allocator.metrics()
    assert metrics["adalora/orth_loss"] == metrics["adalora/orth_grad_norm"] == metrics["adalora/orth_grad_ratio"] == 0
    with_penalty = Run(optimizer=lambda p: torch.optim.SGD(p, lr=0.2))
    with_penalty.backward()
    with_penalty.optimizer.step()
    changed = {n for n, g in gradients.items() if not torch.equal(with_penalty.model.get_parameter(n).grad, g)}
    assert changed == {n for n in gradients if not n.endswith("lora_E")}


def test_compiled_model_trains_the_same():
    """torch.compile wraps the model and its names; masks and weights must not notice."""
    plain = Run().train()
    run = Run()
    compiled = torch.compile(run.model, backend="aot_eager")
    run.optimizer = adamw([p for p in compiled.parameters() if p.requires_grad])
    run.allocator = RankAllocator(compiled, options(), total_step=TOTAL).attach(run.optimizer)
    original, run.model = run.model, compiled
    run.train()
    run.model = original
    assert run.masks == plain.masks
    assert distance(run, plain) < 1e-5
    assert run.allocator.ranks().keys() == plain.allocator.ranks().keys()


# ---- refusals


def test_optimizer_that_lacks_an_adapter_is_refused_by_name():
    """The forgotten layer would get importance, masks and no training."""
    model = inject_adalora(Toy(), options())
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and name != "blocks.1.down.lora_B"]
    allocator = RankAllocator(model, options(), total_step=TOTAL)
    with pytest.raises(UserError, match=r"'blocks\.1\.down\.lora_B'"):
        allocator.attach(adamw(parameters))
    every = [p for p in model.parameters() if p.requires_grad]
    assert allocator.attach(adamw(every)) is allocator  # the failure left it usable


def test_attaching_twice_is_refused():
    """Two pairs of hooks would observe and regularise twice."""
    run = Run()
    with pytest.raises(UserError, match="attached already"):
        run.allocator.attach(run.optimizer)
    with pytest.raises(UserError, match="attached already"):
        run.allocator.attach(adamw([p for p in run.model.parameters() if p.requires_grad]))


def test_second_allocator_on_one_optimizer_is_refused():
    """A notebook cell run twice makes a new allocator: the penalty would count twice and two masks would fight."""
    run = Run()
    with pytest.raises(UserError, match="already"):
        RankAllocator(run.model, options(), total_step=TOTAL).attach(run.optimizer)


def test_order_of_the_two_lines():
    """Both lines of a hand-written loop, in the wrong order or with another config, must say so."""
    with pytest.raises(UserError, match="inject_adalora"):
        RankAllocator(Toy(), options(), total_step=TOTAL)
    model = inject_adalora(Toy(), options())
    with pytest.raises(UserError, match=r"rank 4 but adalora\.init_r is 6"):
        RankAllocator(model, options(init_r=6), total_step=TOTAL)
    with pytest.raises(UserError, match="no step for pruning"):
        RankAllocator(model, options(), total_step=9)
    with pytest.raises(UserError, match="torch optimizer"):
        RankAllocator(model, options(), total_step=TOTAL).attach("adamw")
    with pytest.raises(UserError, match="not attached"):
        RankAllocator(model, options(), total_step=TOTAL).state_dict()


def test_half_precision_adapters_are_refused():
    """Model.to(bfloat16) after injection turns the master weights and Ī, Ū into 16 bit."""
    model = inject_adalora(Toy(), options()).to(torch.bfloat16)
    with pytest.raises(Unsupported, match=r"blocks\.0\.up\.lora_A.*bfloat16"):
        RankAllocator(model, options(), total_step=TOTAL).attach(adamw(list(model.parameters())))


def test_closures_are_refused():
    """LBFGS evaluates the loss many times a step; the gradients seen before the step are not the ones used."""
    run = Run()
    run.backward()
    for call in (
        lambda: run.optimizer.step(lambda: None),
        lambda: run.optimizer.step(closure=lambda: None),
    ):
        with pytest.raises(Unsupported, match="closure"):
            call()
    assert run.allocator.step == 0
    run.optimizer.step(None)
    run.optimizer.step(closure=None)
    assert run.allocator.step == 2


# ---- what is reported


def test_metrics_have_the_documented_keys_and_true_values():
    """Reports and dashboards read these names."""
    run = Run().train(5)
    assert run.allocator.metrics()["adalora/budget"] == 24
    metrics = run.train().allocator.metrics()
    assert set(metrics) == {
        f"adalora/{key}"
        for key in (
            "budget", "spent", "rank_total", "rank_min", "rank_max", "zero_rank_modules", "orth_loss", "orth_grad_norm",
            "orth_grad_ratio", "skipped_steps", "masks_digest",
        )
    }  # fmt: skip
    ranks = [int(torch.tensor(row).sum()) for row in run.allocator.rank_pattern().values()]
    assert list(run.allocator.ranks().values()) == ranks
    assert metrics["adalora/budget"] == metrics["adalora/rank_total"] == sum(ranks) == 12
    assert (metrics["adalora/rank_min"], metrics["adalora/rank_max"]) == (min(ranks), max(ranks))
    assert metrics["adalora/zero_rank_modules"] == ranks.count(0)
    assert metrics["adalora/orth_loss"] > 0
    assert metrics["adalora/orth_grad_norm"] > 0
    assert 0 < metrics["adalora/orth_grad_ratio"] < float("inf")
    assert run.allocator.last_allocation.ranks == run.allocator.ranks()


def test_digest_changes_with_the_mask_only():
    """Equal digests are the proof that ranks agree; a digest of something else proves nothing."""
    run = Run()
    seen = {}
    for _ in range(TOTAL):
        before = (run.allocator.mask.tolist(), run.allocator.masks_digest())
        run.step()
        after = (run.allocator.mask.tolist(), run.allocator.masks_digest())
        assert (before[0] == after[0]) == (before[1] == after[1])
        seen.setdefault(after[1], after[0])
    assert len(seen) >= 4


# ---- continuing


@pytest.mark.parametrize("at", [2, 7, 9, 17, 18, 21], ids=lambda t: f"step {t}")
@pytest.mark.parametrize(
    ("score", "allocator_first"),
    [("sensitivity_uncertainty", False), ("sensitivity_uncertainty", True), ("taylor", False)],
)
def test_continued_run_is_bit_equal(at, score, allocator_first):
    """Without Ī, Ū, mask and phase (PEFT saves none) a resumed run prunes other triplets."""
    config = options(score=score, modules_to_save=["head"])
    straight = Run(config, head=True).train()
    snapshot = Run(config, head=True).train(at).snapshot()
    resumed = Run(config, head=True, seed=99).restore(snapshot, allocator_first=allocator_first)
    assert resumed.allocator.step == at
    expected = max((t for t in ALLOCATIONS if t <= at), default=None)
    assert (resumed.allocator.last_allocation.step if expected else resumed.allocator.last_allocation) == expected
    assert resumed.allocator.frozen == (at >= FINAL)
    resumed.train()
    assert resumed.masks == {t: mask for t, mask in straight.masks.items() if t > at}
    assert_same(resumed.everything(), straight.everything())
    assert resumed.allocator.metrics() == straight.allocator.metrics()


def test_overflow_just_before_the_snapshot_is_not_forgotten():
    """The allocation that is due must survive the resume."""
    straight = Run().train(8).step(poison=POISONS["inf in A"])
    snapshot = straight.snapshot()
    resumed = Run(seed=99).restore(snapshot)
    straight.train()
    resumed.train()
    assert list(resumed.masks) == [10, 12, 15, 18]
    assert_same(resumed.everything(), straight.everything())
    assert resumed.allocator.skipped_steps == 1


@pytest.mark.parametrize("at", [2, 12])
def test_a_frozen_run_can_be_rolled_back(at):
    """After a loss spike one goes back to an earlier state in the same process."""
    run = Run().train(at)
    snapshot = run.snapshot()
    first = run.train().everything()
    run.restore(snapshot)
    assert not run.allocator.frozen
    assert all(layer.keep_mask is None for _, layer in adapter_layers(run.model))
    run.train()
    assert_same(run.everything(), first)


def test_state_is_a_copy_and_loads_as_one():
    """A checkpoint held in memory must not move with the run."""
    run = Run().train(7)
    state = run.allocator.state_dict()
    kept = copy.deepcopy(state)
    run.step()
    assert_same(state, kept)
    run.allocator.load_state_dict(state)
    run.step()
    assert_same(state, kept)


def test_state_of_another_run_is_refused():
    """Ī and Ū of another model or schedule would be taken without a word."""
    state = Run().train(7).allocator.state_dict()
    with pytest.raises(UserError, match="24 steps, this one has 30"):
        Run(total_step=30).allocator.load_state_dict(state)
    with pytest.raises(UserError, match="24 triplets, this model 30"):
        Run(options(init_r=5)).allocator.load_state_dict(state)
    other = Run(options(target_modules=["blocks.0.up", "blocks.1.up", "blocks.2.up"], init_r=8))
    with pytest.raises(UserError, match="another model"):
        other.allocator.load_state_dict(state)
    assert other.allocator.step == 0


def test_state_of_another_score_or_rank_is_refused_before_anything_is_taken():
    """Else a rank goes on with another rank's statistics where the sizes agree, and with a traceback where not."""
    state = Run(options(score="taylor")).train(7).allocator.state_dict()
    other = Run()
    with pytest.raises(UserError, match=r"has no 'sensitivity.*adalora\.score"):
        other.allocator.load_state_dict(state)
    state = Run().train(7).allocator.state_dict()
    state["spans"][0, 0] += 1
    with pytest.raises(UserError, match="another rank's pieces"):
        other.allocator.load_state_dict(state)
    assert other.allocator.step == 0


def test_adapters_of_reads_the_trained_weights():
    """The helper used by the comparisons must look at the live parameters."""
    run = Run().train(2)
    weights = adapters_of(run.model)
    assert weights["blocks.0.up"]["A"] is run.model.get_parameter("blocks.0.up.lora_A")
