"""One of the projections of a layer's experts, all experts at once: what nn.Linear is to a dense layer."""

from __future__ import annotations

from torch import Tensor, nn

from adalora_scale.experts.groups import Groups
from adalora_scale.experts.products import grouped_product


class ExpertLinear(nn.Module):
    """``y_i = W_e x_i + b_e`` for row i of expert e.

    Args:
        weight: (experts, out_features, in_features), or (experts, in_features, out_features) where `transposed`.
        bias: (experts, out_features), or None.
        transposed: the checkpoint holds each expert's weight with the input first.

    Sides are attributes: under ZeRO-3 a partitioned weight has shape (0,).
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None = None, *, transposed: bool = False) -> None:
        super().__init__()
        self.experts, first, second = weight.shape
        self.in_features, self.out_features = (first, second) if transposed else (second, first)
        self.transposed = transposed
        self.weight = weight
        self.register_parameter("bias", bias)
        self.bias: Tensor | None

    def forward(self, x: Tensor, groups: Groups) -> Tensor:  # (S, in_features) -> (S, out_features), rows by expert
        y = grouped_product(x.to(self.weight.dtype), self.weight, groups, turned=not self.transposed)
        return y if self.bias is None else y + self.bias.index_select(0, groups.expert_of_row)

    def extra_repr(self) -> str:
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, transposed={self.transposed}"
        )
