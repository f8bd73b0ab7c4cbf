"""A projection of a layer's experts with every expert's weight in 4 bits, beside `Linear4bit`.

One expert's bytes are what bitsandbytes gives for that expert's (out_features, in_features) matrix alone: a scale
belongs to one expert's weights only, and each expert has a second level, with a mean, of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adalora_scale.experts.groups import Groups
from adalora_scale.experts.linear import ExpertLinear
from adalora_scale.quantization import functional
from adalora_scale.quantization.expert_operators import expert_weight, matmul_experts_4bit
from adalora_scale.quantization.spec import CODES, QuantSpec


class ExpertLinear4bit(nn.Module):
    """``y_i = W_e x_i + b_e`` for row i of expert e, with W in 4 bits; neither W nor b is trained.

    Args:
        experts: how many there are.
        in_features, out_features: sides of one expert's matrix.
        spec: code book, block size, double quantisation, compute dtype.
        bias: whether there is one.
        dtype: of the bias.
        device: of all tensors; they are uninitialised, see `quantize_`.
        transposed: the checkpoint holds each expert's weight as (in_features, out_features); the bytes here are of
            (out_features, in_features) all the same.
        name: of the layer, for errors.

    Attributes:
        blocks: of one expert.
        weight: (experts · blocks, blocksize / 2) uint8, two codes a byte, expert by expert.
        scales: (experts · blocks,) uint8, or (experts · blocks, 4) without double quantisation.
        nested: (experts, 4 · (⌈blocks / 256⌉ + 1)) uint8: the bytes of each expert's second-level float32 scales and of
            its mean absmax; None without double quantisation. The values that the codes stand for are bitsandbytes'
            constant and nobody's to store.

    All three are parameters: engines shard every byte. Only experts that a row reached are dequantised, one at a time;
    the backward pass dequantises again.

    Raises:
        UserError: the block size does not divide the number of weights of an expert.
    """

    def __init__(
        self,
        experts: int,
        in_features: int,
        out_features: int,
        *,
        spec: QuantSpec,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        transposed: bool = False,
        name: str = "a layer's experts",
    ) -> None:
        super().__init__()
        self.experts, self.in_features, self.out_features = experts, in_features, out_features
        self.spec = spec
        self.transposed = transposed
        self.blocks = spec.blocks(in_features, out_features, name)

        def uninitialised(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), requires_grad=False)

        self.weight = uninitialised(experts * self.blocks, spec.blocksize // 2)
        self.scales = uninitialised(*spec.scales_shape(experts * self.blocks))
        second = spec.nested_bytes(self.blocks) - 4 * CODES
        self.nested = uninitialised(experts, second) if spec.double_quant else None
        self.bias = (
            nn.Parameter(torch.empty(experts, out_features, dtype=dtype, device=device), requires_grad=False)
            if bias
            else None
        )

    @torch.no_grad()
    def quantize_(self, weight: Tensor, bias: Tensor | None = None, name: str = "a layer's experts") -> None:
        """Take the weight of an `ExpertLinear`, (experts, out, in) or turned, and a bias into this layer's tensors.

        Raises:
            UserError: a weight is not finite; `name` says whose.
        """
        for expert, own in enumerate(weight):
            packed, scales, nested = functional.quantize(own.T if self.transposed else own, self.spec, name)
            span = slice(expert * self.blocks, (expert + 1) * self.blocks)
            self.weight[span].copy_(packed)
            self.scales[span].copy_(scales)
            if self.nested is not None:
                self.nested[expert].copy_(own_level(nested))
        if self.bias is not None and bias is not None:
            self.bias.copy_(bias)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the weights of all experts, (experts, out_features, in_features), in `dtype` (the compute dtype)."""
        shape = (self.out_features, self.in_features)
        wanted = dtype or self.spec.compute_dtype
        every = (self.weight, self.scales, self.nested)
        return torch.stack([expert_weight(e, *every, self.spec, shape, wanted) for e in range(self.experts)])

    def forward(self, x: Tensor, groups: Groups) -> Tensor:  # (S, in_features) -> (S, out_features), in x's dtype
        y = matmul_experts_4bit(
            x.to(self.spec.compute_dtype), self.weight, self.scales, self.nested, groups.ends, self.spec.blocksize,
            self.spec.quant_type, (self.out_features, self.in_features),
        )  # fmt: skip
        if self.bias is not None:
            y = y + self.bias.index_select(0, groups.expert_of_row).to(y.dtype)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        s = self.spec
        return (
            f"experts={self.experts}, in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {s.quant_type}, blocksize={s.blocksize}, double_quant={s.double_quant}"
        )


def own_level(nested: Tensor) -> Tensor:
    """Return what `ExpertLinear4bit.nested` keeps of one matrix's second level: all but the code book's values."""
    return nested[: -4 * CODES]


def empty_4bit(layer: ExpertLinear, spec: QuantSpec, name: str) -> ExpertLinear4bit:
    """Return the uninitialised 4-bit layer for an `ExpertLinear`, on the device of its weight.

    Raises:
        UserError: the block size does not divide an expert's weights.
    """
    options: dict[str, Any] = {} if layer.bias is None else {"bias": True, "dtype": layer.bias.dtype}
    return ExpertLinear4bit(
        layer.experts,
        layer.in_features,
        layer.out_features,
        spec=spec,
        device=layer.weight.device,
        transposed=layer.transposed,
        name=name,
        **options,
    )


@torch.no_grad()
def in_16bit(layer: ExpertLinear4bit, dtype: torch.dtype) -> ExpertLinear:
    """Return an `ExpertLinear` with the dequantised weights, as the checkpoint holds them."""
    weight = layer.dequantize(dtype)
    if layer.transposed:
        weight = weight.mT.contiguous()
    bias = None if layer.bias is None else nn.Parameter(layer.bias.to(dtype), requires_grad=False)
    return ExpertLinear(nn.Parameter(weight, requires_grad=False), bias, transposed=layer.transposed)
