"""The oracle: AdaLoRA written as plainly as the paper, in float64, sharing no code with the rest of the package.

A training step here is: merge the update into the base weights, take the loss and its gradients by autograd, clip,
observe importance, add the gradient of the penalty (autograd again, no closed form), AdamW, allocate. Loops instead
of multi-tensor operations, whole tensors instead of pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

FACTORS = ("A", "E", "B")

Tensors = dict[str, dict[str, Tensor]]
"""One tensor for every matrix and factor."""


@dataclass
class ReferenceOptions:
    """The method's options, AdamW's, and the clipping threshold."""

    init_r: int
    target_r: int
    scaling: float
    tinit: int
    tfinal: int
    total_step: int
    delta_t: int
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.1
    score: str = "sensitivity_uncertainty"
    budget_unit: str = "params"
    lr: float = 1e-3
    adam_betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = None


@dataclass
class ReferenceAdapter:
    """One matrix's triplets: A (in, r), E (r,), B (out, r), with their statistics and moments."""

    weight: dict[str, Tensor]
    statistics: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    """Whatever the score remembers, by its own names, then by factor."""
    m: dict[str, Tensor] = field(default_factory=dict)
    v: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.weight = {f: w.detach().clone().double() for f, w in self.weight.items()}
        for state in (self.m, self.v):
            state.update({f: torch.zeros_like(w) for f, w in self.weight.items()})

    def statistic(self, name: str, f: str) -> Tensor:
        """Zeros before the first observation."""
        return self.statistics.setdefault(name, {}).setdefault(f, torch.zeros_like(self.weight[f]))


@dataclass(frozen=True)
class ReferencePlace:
    """Where a matrix's weight is in the base model."""

    parameter: str
    expert: int | None = None
    """Which of the matrices in a 3-D parameter; None where the parameter is the matrix."""
    transposed: bool = False
    """Whether it lies as (in, out)."""


@dataclass(frozen=True)
class ReferenceScore:
    """Sensitivity times uncertainty, and how the presets of it differ."""

    gradient: str = "task"
    """Or "whole": with the penalty's."""
    weight: str = "before"
    """Or "after" the update."""
    last_step: bool = True
    """Whether the step of the final allocation is observed."""
    columns: str = "zero"
    """Or "kept": what becomes of a pruned triplet's columns in the end."""

    def observe(self, adapter: ReferenceAdapter, grads: dict[str, Tensor], o: ReferenceOptions) -> None:
        for f in FACTORS:
            now = (adapter.weight[f] * grads[f]).abs()
            mean = o.beta1 * adapter.statistic("I", f) + (1 - o.beta1) * now
            spread = o.beta2 * adapter.statistic("U", f) + (1 - o.beta2) * (now - mean).abs()
            adapter.statistics["I"][f], adapter.statistics["U"][f] = mean, spread

    def triplet(self, adapter: ReferenceAdapter, k: int) -> float:
        s = {f: adapter.statistic("I", f) * adapter.statistic("U", f) for f in FACTORS}
        return (s["E"][k] + s["A"][:, k].mean() + s["B"][:, k].mean()).item()


class ReferenceTaylor(ReferenceScore):
    """The squared first-order change of the loss when λ is removed, averaged over steps."""

    def observe(self, adapter: ReferenceAdapter, grads: dict[str, Tensor], o: ReferenceOptions) -> None:
        mean = adapter.statistic("change", "E")
        for k in range(o.init_r):
            change = adapter.weight["E"][k] * grads["E"][k]
            mean[k] = o.beta1 * mean[k] + (1 - o.beta1) * change**2

    def triplet(self, adapter: ReferenceAdapter, k: int) -> float:
        return adapter.statistic("change", "E")[k].item()


class ReferenceSensitivity(ReferenceScore):
    """The sensitivity without the uncertainty."""

    def triplet(self, adapter: ReferenceAdapter, k: int) -> float:
        s = {f: adapter.statistic("I", f) for f in FACTORS}
        return (s["E"][k] + s["A"][:, k].mean() + s["B"][:, k].mean()).item()


class ReferenceMagnitude(ReferenceScore):
    """|λ|."""

    def triplet(self, adapter: ReferenceAdapter, k: int) -> float:
        return adapter.weight["E"][k].abs().item()


SCORES = {
    "magnitude": ReferenceMagnitude(),
    "sensitivity": ReferenceSensitivity(),
    "sensitivity_uncertainty": ReferenceScore(),
    "paper": ReferenceScore(gradient="whole"),
    "peft": ReferenceScore(gradient="whole", weight="after", last_step=False, columns="kept"),
    "taylor": ReferenceTaylor(),
}


class ReferenceAdaLora:
    """Trains the adapters of a base model that knows nothing of them.

    Args:
        adapters: for every matrix, A (in, r), E (r,) and B (out, r) to begin with.
        options: the method's options, AdamW's, and the clipping threshold.
        places: where the matrices are; of those that are not named the parameter is `<name>.weight`.
    """

    def __init__(
        self,
        adapters: Mapping[str, Mapping[str, Tensor]],
        options: ReferenceOptions,
        places: Mapping[str, ReferencePlace] | None = None,
    ) -> None:
        self.places = {name: ReferencePlace(f"{name}.weight") for name in adapters} | dict(places or {})
        self.adapters = {name: ReferenceAdapter(dict(weights)) for name, weights in adapters.items()}
        self.o = options
        self.score = SCORES[options.score]
        self.t = 0
        self.frozen = False
        self.mask = {
            name: torch.ones(options.init_r, dtype=torch.bool, device=a["E"].device) for name, a in adapters.items()
        }
        self.masks: dict[int, dict[str, list[bool]]] = {}  # step of an allocation -> mask
        self.budgets: dict[int, int] = {}

    # ---- the loss of a model with the current adapters

    def delta(self, adapter: dict[str, Tensor]) -> Tensor:
        """(out, in)"""
        return self.o.scaling * adapter["B"] @ torch.diag(adapter["E"]) @ adapter["A"].T

    def loss(self, base: nn.Module, loss_of: Callable[[Callable[..., Any]], Tensor], adapters: Tensors) -> Tensor:
        """`loss_of(call)` computes the loss, calling the model with the adapters merged in through `call(**batch)`."""
        merged: dict[str, Tensor] = {}
        experts: dict[str, list[Tensor]] = {}
        for name, adapter in adapters.items():
            place = self.places[name]
            weight = base.get_parameter(place.parameter)
            update = self.delta(adapter).T if place.transposed else self.delta(adapter)
            if place.expert is None:
                merged[place.parameter] = weight + update
            else:
                each = experts.setdefault(place.parameter, list(weight))
                each[place.expert] = weight[place.expert] + update
        merged |= {parameter: torch.stack(each) for parameter, each in experts.items()}
        return loss_of(lambda **batch: functional_call(base, merged, (), batch))

    def train_step(self, base: nn.Module, loss_of: Callable[[Callable[..., Any]], Tensor]) -> float:
        """Take one step on the loss of `loss`."""
        leaves = {n: {f: w.clone().requires_grad_() for f, w in a.weight.items()} for n, a in self.adapters.items()}
        loss = self.loss(base, loss_of, leaves)
        flat = [leaf[f] for leaf in leaves.values() for f in FACTORS]
        grads = iter(torch.autograd.grad(loss, flat))
        self.step({name: {f: next(grads) for f in FACTORS} for name in leaves})
        return loss.item()

    # ---- one optimizer step from given gradients

    def step(self, grads: Tensors) -> None:
        o = self.o
        self.t += 1
        if o.max_grad_norm is not None:
            norm = torch.stack([g.square().sum() for gs in grads.values() for g in gs.values()]).sum().sqrt()
            factor = min(1.0, o.max_grad_norm / (norm.item() + 1e-6))
            grads = {n: {f: g * factor for f, g in gs.items()} for n, gs in grads.items()}
        whole = self.with_penalty(grads)
        seen = {"task": grads, "whole": whole}[self.score.gradient]
        if self.score.weight == "before":
            self.observe(seen)
        for name, adapter in self.adapters.items():
            for f in FACTORS:
                self.adamw(adapter, f, whole[name][f])
        if self.score.weight == "after":
            self.observe(seen)
        if self.is_allocation(self.t):
            self.allocate()
        elif self.frozen:
            self.zero_lambda()

    def adamw(self, adapter: ReferenceAdapter, f: str, g: Tensor) -> None:
        o = self.o
        b1, b2 = o.adam_betas
        adapter.m[f] = b1 * adapter.m[f] + (1 - b1) * g
        adapter.v[f] = b2 * adapter.v[f] + (1 - b2) * g * g
        m_hat = adapter.m[f] / (1 - b1**self.t)
        v_hat = adapter.v[f] / (1 - b2**self.t)
        adapter.weight[f] = adapter.weight[f] * (1 - o.lr * o.weight_decay)
        adapter.weight[f] = adapter.weight[f] - o.lr * m_hat / (v_hat.sqrt() + o.eps)

    def penalty(self, factors: dict[tuple[str, str], Tensor]) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=next(iter(factors.values())).device)
        for (name, _), factor in factors.items():
            if self.frozen and self.score.columns == "zero":
                factor = factor[:, self.mask[name]]
            deviation = factor.T @ factor - torch.eye(factor.shape[1]).to(factor)
            if deviation.numel() and deviation.abs().max() > 0:
                total = total + torch.linalg.matrix_norm(deviation)
        return self.o.orth_reg_weight * total / len(factors)

    def with_penalty(self, grads: Tensors) -> Tensors:
        if self.o.orth_reg_weight == 0:
            return grads
        factors = {(n, f): a.weight[f].clone().requires_grad_() for n, a in self.adapters.items() for f in ("A", "B")}
        # A module of rank 0 has no columns left in the penalty: its gradient is zero, not missing.
        gradients = torch.autograd.grad(self.penalty(factors), list(factors.values()), materialize_grads=True)
        extra = dict(zip(factors, gradients, strict=True))
        return {n: {f: g + extra.get((n, f), 0) for f, g in gs.items()} for n, gs in grads.items()}

    def observe(self, grads: Tensors) -> None:
        if self.frozen or (self.t == self.o.total_step - self.o.tfinal and not self.score.last_step):
            return
        for name, adapter in self.adapters.items():
            self.score.observe(adapter, grads[name], self.o)

    # ---- allocation

    def is_allocation(self, t: int) -> bool:
        end = self.o.total_step - self.o.tfinal
        return t == end or (self.o.tinit < t < end and t % self.o.delta_t == 0)

    def cost(self, adapter: ReferenceAdapter) -> int:
        """Of one triplet."""
        if self.o.budget_unit == "triplets":
            return 1
        return len(adapter.weight["A"]) + len(adapter.weight["B"]) + 1

    def budget(self, t: int) -> int:
        o, n = self.o, sum(self.cost(adapter) for adapter in self.adapters.values())
        first, last, end = o.init_r * n, o.target_r * n, o.total_step - o.tfinal
        if t <= o.tinit:
            return first
        if t >= end:
            return last
        return int((first - last) * (1 - (t - o.tinit) / (end - o.tinit)) ** 3 + last)

    def scores(self) -> dict[str, list[float]]:
        return {
            name: [self.score.triplet(adapter, k) for k in range(self.o.init_r)]
            for name, adapter in self.adapters.items()
        }

    def allocate(self) -> None:
        ranked = [
            (-score / self.cost(self.adapters[name]), position, name, k)
            for position, (name, row) in enumerate(self.scores().items())
            for k, score in enumerate(row)
        ]
        kept = set()
        left = self.budget(self.t)
        for _, _, name, k in sorted(ranked, key=lambda item: (item[0], item[1], item[3])):
            if self.cost(self.adapters[name]) <= left:
                left -= self.cost(self.adapters[name])
                kept.add((name, k))
        self.mask = {
            n: torch.tensor([(n, k) in kept for k in range(self.o.init_r)], device=a.weight["E"].device)
            for n, a in self.adapters.items()
        }
        self.masks[self.t] = {name: row.tolist() for name, row in self.mask.items()}
        self.budgets[self.t] = self.budget(self.t)
        self.zero_lambda()
        if self.t == self.o.total_step - self.o.tfinal:
            self.frozen = True
            if self.score.columns == "zero":
                for name, adapter in self.adapters.items():
                    for state in (adapter.weight, adapter.m, adapter.v):
                        for f in FACTORS:
                            state[f] = state[f] * self.mask[name]

    def zero_lambda(self) -> None:
        for name, adapter in self.adapters.items():
            adapter.weight["E"] = adapter.weight["E"] * self.mask[name]
