"""A base layer with a rank-adaptive update in SVD form.

Vocabulary (the paper's in brackets; r is the number of triplets, k indexes them):

    lora_A   (in_features, r)    [Q, transposed]  column k is the right vector of triplet k
    lora_E   (r,)                [the diagonal of Λ]
    lora_B   (out_features, r)   [P]              column k is the left vector of triplet k

A layer of n experts has n such matrices: A (n · in_features, r), E (n, r), B (n · out_features, r), expert by expert.

What in_features and out_features are for a type of base layer, and how the update is computed, say the adaptables.
Both factors are tall with the rank last, so a triplet is a column in each and sharding over rows never cuts one. The
file format (PEFT's) has A as (r, in) and E as (r, 1); shapes turn only there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from adalora_scale.adalora.adaptables import FACTORS, FileForm, adaptable_of, block
from adalora_scale.adalora.adapted_product import adapted


class AdaLoraLayer(nn.Module):
    """``y = base(x) + s · ((dropout(x) A) ⊙ E) Bᵀ`` with a frozen base.

    Args:
        base_layer: a layer of one of the types in `adaptables`; its parameters are frozen.
        r: number of triplets; 0 makes the layer transparent.
        scaling: s, constant through pruning.
        dropout: probability of dropping an input feature of the adapter.
        init_weights: how A, E and B begin; either way the update begins at zero. `adalora`: A and B from N(0,
            init_std²), E zero. `lora`: A uniform in ±1/√fan-in, B zero, E one, which is LoRA's start: the first step
            moves the same factor by the same gradient.
        init_std: standard deviation of A and B under `adalora`.
        seed: of the layer's own generator. Values do not depend on the device, nor on which other layers are drawn,
            so ranks that hold different layers or rows draw the same adapter.

    The adapter's parameters are float32 whatever the base's dtype (they are the master weights) and are cast to the
    dtype of the input for the product, as autocast does; of the output where the input is no floating point number.

    Raises:
        Unsupported: nothing handles the base layer's type, or it has a setting that is not supported.

    Source: arXiv 2303.10512 eq. 3; peft/tuners/adalora/layer.py, SVDLinear; `lora`: peft/tuners/lora/layer.py,
        reset_lora_parameters (Kaiming uniform with a = √5).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        r: int,
        scaling: float,
        dropout: float = 0.0,
        init_weights: str = "adalora",
        init_std: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.adaptable = adaptable_of(base_layer)
        self.in_features, self.out_features = self.adaptable.sides(base_layer)
        """Rows of A and of B, of one matrix."""
        self.matrices = self.adaptable.matrices(base_layer)
        """How many matrices the base stands for: 1, or one for each expert."""
        self.base_layer = base_layer.requires_grad_(False)
        for setting in getattr(base_layer, "__constants__", ()):
            # Model code reads them: Whisper's encoder its convolutions' stride.
            if not hasattr(self, setting):
                setattr(self, setting, getattr(base_layer, setting))
        self.r = r
        self.scaling = scaling
        self.init_weights, self.init_std, self.seed = init_weights, init_std, seed
        self.keep_mask: list[bool] | None = None
        """After the final allocation: which triplets are kept; None before it."""
        self.emptied = False
        """Whether none is kept and all columns are zero: nothing is computed any more, and gradients are zeros."""
        self.earlier: Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
        """Gives an earlier adapter's A (in, k), E (k,) and B (out, k), k ≤ r, which training goes on from."""
        self.bypassed = False
        """Whether the forward is the base's alone: switched off for a while, or merged into the weight."""
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        device = self.weight.device
        for factor, shape in self.shapes(r).items():
            setattr(self, factor, nn.Parameter(torch.empty(shape, dtype=torch.float32, device=device)))
        self.lora_A: nn.Parameter
        self.lora_E: nn.Parameter
        self.lora_B: nn.Parameter
        self.reset_adapter()

    def shapes(self, r: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of A, E and B with r triplets a matrix, in that order."""
        n = self.matrices
        e = (r,) if n == 1 else (n, r)
        return dict(zip(FACTORS, ((n * self.in_features, r), e, (n * self.out_features, r)), strict=True))

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Set the factors to what `initial_factors` gives; nothing happens on the meta device."""
        if self.lora_A.is_meta:
            return
        for factor, value in zip(FACTORS, self.initial_factors(), strict=True):
            getattr(self, factor).copy_(value)

    def initial_factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the A, E and B that training starts with, whole, float32, on the CPU.

        An earlier adapter's triplets take the first places.
        """
        generator = torch.Generator().manual_seed(self.seed)
        of_a, of_e, of_b = self.shapes(self.r).values()
        if self.init_weights == "lora":
            bound = self.adaptable.fan_in(self.base_layer) ** -0.5
            a = torch.rand(of_a, generator=generator, dtype=torch.float32, device="cpu")
            a = (2 * a - 1) * bound
            b = torch.zeros(of_b, dtype=torch.float32, device="cpu")
            e = torch.ones(of_e, dtype=torch.float32, device="cpu")
        else:
            a, b = (
                torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu") * self.init_std
                for shape in (of_a, of_b)
            )
            e = torch.zeros(of_e, dtype=torch.float32, device="cpu")
        a[self.adaptable.still_rows(self.base_layer)] = 0
        if self.earlier is not None:
            for new, old in zip((a, e, b), self.earlier(), strict=True):
                new[..., : old.shape[-1]] = old
        return a, e, b

    # Some model code asks a linear layer for its weight's dtype or device (T5's `wo`, for one).
    @property
    def weight(self) -> torch.Tensor:
        """The frozen base weight."""
        return cast(torch.Tensor, self.base_layer.weight)

    @property
    def bias(self) -> torch.Tensor | None:
        """The frozen base bias."""
        return cast(torch.Tensor | None, self.base_layer.bias)

    @property
    def form(self) -> FileForm:
        """How files hold the layer's update."""
        return self.adaptable.form(self.base_layer)

    def forward(self, x: torch.Tensor, *more: Any) -> torch.Tensor:
        if self.r == 0 or self.bypassed:
            return cast(torch.Tensor, self.base_layer(x, *more))
        if self.emptied:
            y = self.base_layer(x, *more)
            return cast(torch.Tensor, _NoUpdate.apply(y, self.lora_A, self.lora_E, self.lora_B))
        product = self.adaptable.product
        if product is not None and not more and (found := adapted(self, product, x)) is not None:
            return found
        return self.plain(x, self.lora_A, self.lora_E, self.lora_B, *more)

    def plain(
        self, x: torch.Tensor, lora_a: torch.Tensor, lora_e: torch.Tensor, lora_b: torch.Tensor, *more: Any
    ) -> torch.Tensor:
        """Return the base's output with the update that these factors make, by operations that autograd knows."""
        y = cast(torch.Tensor, self.base_layer(x, *more))
        dtype = x.dtype if x.is_floating_point() else y.dtype
        a, b = lora_a.to(dtype), lora_b.to(dtype)
        singular = (lora_e * self.scaling).to(dtype)
        return self.adaptable.add_update(self.base_layer, y, x, a, singular, b, self.dropout, *more)

    @property
    def triplet_size(self) -> int:
        """Parameters of one triplet."""
        return self.in_features + self.out_features + 1

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """Return ΔW = s · B diag(E) Aᵀ as float32, (out_features, in_features); (experts, out, in) for experts."""
        if self.matrices > 1:
            a, b = self.lora_A.unflatten(0, (self.matrices, -1)), self.lora_B.unflatten(0, (self.matrices, -1))
            return (b * (self.lora_E * self.scaling).unsqueeze(1)) @ a.mT
        return block(self.lora_A.T, self.lora_E * self.scaling, self.lora_B, 0, self.out_features, transposed=False)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, scaling={self.scaling:g}"


class _NoUpdate(torch.autograd.Function):
    """The output as it is, and zeros as the factors' gradients, which are what zero columns give.

    Leaving the factors out would leave them without gradients, and DDP waits for one of every parameter that it holds.
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        ctx.factors = [(factor.shape, factor.dtype, factor.device) for factor in factors]
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, ...]:
        zeros = (torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.factors)
        return gradients[0], *zeros
