"""torch's Embedding, and transformers' scaled one: a matrix product with one-hot vectors, so A's rows are looked up.

The weight lies as (num_embeddings, embedding_dim), the input first. Source: peft/tuners/lora/layer.py, Embedding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adalora_scale.adalora.adaptables.base import Adaptable, FileForm
from adalora_scale.errors import Unsupported

_SCALED = "ScaledWordEmbedding"  # Gemma3TextScaledWordEmbedding and its like: the looked-up rows times embed_scale


class Embedding(Adaptable[nn.Embedding]):
    """A look-up table; a padding token's row never changes.

    Gradients of the adapter are dense, also where the base has `sparse=True`.
    """

    types = (nn.Embedding,)
    naming = FileForm(
        adalora=("lora_embedding_A", "lora_E", "lora_embedding_B"), lora=("lora_embedding_A", "lora_embedding_B")
    )
    transposed = True

    def sides(self, base: nn.Embedding) -> tuple[int, int]:
        plain = type(base).forward is nn.Embedding.forward
        if not plain and not (type(base).__name__.endswith(_SCALED) and hasattr(base, "embed_scale")):
            raise Unsupported(
                f"cannot adapt a {type(base).__module__}.{type(base).__name__}: its forward is not an embedding's own. "
                f"Exclude it with adalora.exclude_modules."
            )
        for name in ("max_norm", "scale_grad_by_freq"):
            if getattr(base, name):
                raise Unsupported(
                    f"cannot adapt an Embedding with {name}={getattr(base, name)}; exclude it with "
                    f"adalora.exclude_modules."
                )
        return base.num_embeddings, base.embedding_dim

    def add_update(
        self,
        base: nn.Embedding,
        y: Tensor,
        x: Tensor,
        a: Tensor,
        e: Tensor,
        b: Tensor,
        dropout: Callable[[Tensor], Tensor],
        *more: Any,
    ) -> Tensor:  # x: (...) token ids, y: (..., embedding_dim)
        rows = F.embedding(x, a, base.padding_idx)  # (..., r)
        kept = dropout(rows.new_ones(*x.shape, 1))  # what dropping elements of a one-hot vector comes to
        update = F.linear(rows * kept * e, b)
        scale: Tensor | float = getattr(base, "embed_scale", 1.0)
        scaled = update * (scale.to(base.weight.dtype) if isinstance(scale, torch.Tensor) else scale)
        return y + scaled.to(y.dtype)

    def fan_in(self, base: nn.Embedding) -> int:
        """One: a row is looked up, the rest of the one-hot vector is zero."""
        return 1

    def still_rows(self, base: nn.Embedding) -> list[int]:
        return [] if base.padding_idx is None else [base.padding_idx]
