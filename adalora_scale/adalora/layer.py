"""A linear layer with a rank-adaptive update in SVD form.

Vocabulary (the paper's in brackets; r is the number of triplets, k indexes them):

    lora_A   (in_features, r)    [Q, transposed]  column k is the right vector of triplet k
    lora_E   (r,)                [the diagonal of Λ]
    lora_B   (out_features, r)   [P]              column k is the left vector of triplet k

Both factors are tall with the rank last, so a triplet is a column in each and sharding over rows never cuts one. The
file format (PEFT's) has A as (r, in) and E as (r, 1); shapes turn only there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

from adalora_scale.errors import Unsupported
from adalora_scale.quantization.linear import Linear4bit

FACTORS = ("lora_A", "lora_E", "lora_B")
"""Names of a layer's adapter parameters, in the order every list of adapter tensors follows."""


class AdaLoraLayer(nn.Module):
    """``y = base(x) + s · ((dropout(x) A) ⊙ E) Bᵀ`` with a frozen base.

    Args:
        base_layer: nn.Linear, transformers' Conv1D or a Linear4bit; its parameters are frozen.
        r: number of triplets; 0 makes the layer transparent.
        scaling: s = lora_alpha / init_r, constant through pruning.
        dropout: probability of dropping an input feature of the adapter.
        init_std: standard deviation of A and B; E starts at zero, so the update starts at zero.
        seed: of the layer's own generator. Values do not depend on the device, nor on which other layers are drawn,
            so ranks that hold different layers or rows draw the same adapter.

    The adapter's parameters are float32 whatever the base's dtype (they are the master weights) and are cast to the
    dtype of the input for the product, as autocast does.

    Raises:
        Unsupported: the base layer's type is not one of the three.

    Source: arXiv 2303.10512 eq. 3; peft/tuners/adalora/layer.py, SVDLinear.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        *,
        r: int,
        scaling: float,
        dropout: float = 0.0,
        init_std: float = 0.02,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = linear_features(base_layer)
        self.base_layer = base_layer.requires_grad_(False)
        self.r = r
        self.scaling = scaling
        self.init_std, self.seed = init_std, seed
        self.keep_mask: list[bool] | None = None
        """After the final allocation: which triplets are kept; None before it."""
        self.earlier: Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]] | None = None
        """Gives an earlier adapter's A (in, k), E (k,) and B (out, k), k ≤ r, which training goes on from."""
        self.dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.empty(self.in_features, r, dtype=torch.float32, device=device))
        self.lora_E = nn.Parameter(torch.empty(r, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, dtype=torch.float32, device=device))
        self.reset_adapter()

    @torch.no_grad()
    def reset_adapter(self) -> None:
        """Set A and B to what `initial_factors` draws, and E to zero; nothing happens on the meta device."""
        if self.lora_A.is_meta:
            return
        for parameter, value in zip((self.lora_A, self.lora_E, self.lora_B), self.initial_factors(), strict=True):
            parameter.copy_(value)

    def initial_factors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the A, E and B that training starts with, whole, float32, on the CPU.

        A and B are drawn from N(0, init_std²) and E is zero; an earlier adapter's triplets take the first places.
        """
        generator = torch.Generator().manual_seed(self.seed)
        a, b = (
            torch.randn(rows, self.r, generator=generator, dtype=torch.float32, device="cpu") * self.init_std
            for rows in (self.in_features, self.out_features)
        )
        e = torch.zeros(self.r, dtype=torch.float32, device="cpu")
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

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (..., in_features) -> (..., out_features)
        y = self.base_layer(x)
        if self.r == 0:
            return y
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        singular = (self.lora_E * self.scaling).to(x.dtype)
        update = F.linear((self.dropout(x) @ a) * singular, b)
        return y + update.to(y.dtype)

    @torch.no_grad()
    def delta_weight(self) -> torch.Tensor:
        """Return ΔW = s · B diag(E) Aᵀ as float32, shaped (out_features, in_features)."""
        return (self.lora_B * (self.lora_E * self.scaling)) @ self.lora_A.T

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, scaling={self.scaling:g}"


def linear_features(module: nn.Module) -> tuple[int, int]:
    """Return (in_features, out_features) of a supported base layer.

    Read from attributes, not from the weight: under ZeRO-3 a partitioned weight has shape (0,).

    Raises:
        Unsupported: the module is neither nn.Linear, nor transformers' Conv1D, nor a Linear4bit.
    """
    if isinstance(module, nn.Linear | Linear4bit):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return module.nx, module.nf
    raise Unsupported(
        f"cannot adapt a {type(module).__module__}.{type(module).__name__}; AdaLoRA layers wrap nn.Linear and "
        f"transformers' Conv1D. Exclude it with adalora.exclude_modules."
    )
